"""Results as text, as a table in Markdown and as JSON. All are made of summaries (see results.py)."""
import json

from results import OWN
from sides import FVD, LIMIT, LIMIT_RING, OURS, QSD, RING

ROW = '  %-17s %10s %-5s  %9s  %8s  %s'


def number(value):
    """Three or four digits, the way people write them."""
    if value is None:
        return ''
    if value >= 100000:
        return '%.0fk' % (value / 1000)
    if value >= 10000:
        return '%.1fk' % (value / 1000)
    return '%.0f' % value if value >= 100 else '%.3g' % value


def verdict(bound, met, less_is_better):
    if bound is None:
        return ''
    return '%s %g %s' % ('≤' if less_is_better else '≥', bound, 'met' if met else 'NOT MET')


def ratio_text(line, ratio):
    text = '%.2f of %s (%.2f..%.2f)' % (ratio['median'], ratio['to'], ratio['smallest'], ratio['largest'])
    return ' '.join(part for part in (text, verdict(ratio['bound'], ratio['met'], line['less_is_better'])) if part)


def text_head():
    return ROW % ('', 'median', '', 'CPU us/op', 'peak MiB', 'ratio of the medians, smallest and largest of a round')


def text_of(line):
    """A line of the report with a row for each side."""
    rows = [line['name']]
    for side, has in line['sides'].items():
        said = [verdict(has['bound'], has['met'], line['less_is_better'])]
        said += [ratio_text(line, ratio) for ratio in line['ratios'] if ratio['of'] == side]
        rows.append((ROW % (side, number(has['median']), line['unit'], number(has['cpu_us_per_operation']),
                            number(has['peak_mib']), '; '.join(part for part in said if part))).rstrip())
    for side, why in line['left_out'].items():
        rows.append('  %-17s left out: %s' % (side, why))
    return '\n'.join(rows)


def totals(lines):
    """How many of the wanted bounds are met, and of how many."""
    items = [item for line in lines for item in (*line['ratios'], *line['sides'].values())]
    known = [item['met'] for item in items if item['met'] is not None]
    return sum(known), len(known)


# --- Markdown ---------------------------------------------------------------------------------------------------------

def machine_text(machine):
    versions = ', '.join('%s %s' % item for item in machine['versions'].items() if item[1])
    return '%s, Linux %s, %d CPUs (%s), %d GiB; %s' % (
        machine['date'], machine['kernel'], machine['cpus'], machine['processor'], machine['memory_gib'], versions)


def markdown_ratio(line, of, to):
    for ratio in line['ratios']:
        if ratio['of'] == of and ratio['to'] in to:
            text = '%.2f' % ratio['median']
            if ratio['bound'] is None:
                return text
            text += ' (%s %g)' % ('≤' if line['less_is_better'] else '≥', ratio['bound'])
            return '**%s**' % text if ratio['met'] else text
    return ''


def markdown_others(line, of):
    return ', '.join('%.2f × %s' % (ratio['median'], ratio['to']) for ratio in line['ratios']
                     if ratio['of'] == of and ratio['to'] not in (QSD, LIMIT, LIMIT_RING))


def both(line, of, key):
    """The number of our side and of the peer."""
    values = [line['sides'][side][key] for side in (of, QSD) if side in line['sides']]
    return ' / '.join(number(value) for value in values if value is not None)


def markdown_rows(line):
    named = {OURS: '', RING: ', io_uring', FVD: ', FVD'}
    for side, has in line['sides'].items():
        if side not in OWN and (line['ratios'] and side not in [ratio['of'] for ratio in line['ratios']]):
            continue
        median = ('%s %s' % (number(has['median']), line['unit'])).strip()
        if has['bound'] is not None:
            median += ' (%s %g)' % ('≤' if line['less_is_better'] else '≥', has['bound'])
        yield [line['name'] + named.get(side, ', ' + side), median, markdown_ratio(line, side, (QSD,)),
               markdown_ratio(line, side, (LIMIT, LIMIT_RING)), markdown_others(line, side),
               both(line, side, 'cpu_us_per_operation'), both(line, side, 'peak_mib')]


def markdown(machine, lines):
    heads = ['', 'imgfuse', '× QSD', '× limit', 'others', 'CPU µs/op, imgfuse / QSD', 'peak MiB, imgfuse / QSD']
    rows = [heads, ['---'] + ['---:'] * 3 + ['---'] + ['---:'] * 2]
    rows += [row for line in lines for row in markdown_rows(line)]
    table = '\n'.join('| %s |' % ' | '.join(row) for row in rows)
    return '%s\n\nMeasured on %s.\n' % (table, machine_text(machine))


# --- JSON -------------------------------------------------------------------------------------------------------------

def as_json(machine, rounds, seconds, lines):
    return json.dumps({'machine': machine, 'rounds': rounds, 'seconds': seconds, 'lines': lines}, indent=2) + '\n'
