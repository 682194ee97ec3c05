"""A bar chart of how many times the peer's speed imgfuse has, as SVG: one file, readable on white and on black."""
import math
from xml.sax.saxutils import escape

from report import machine_text
from sides import LIMIT, LIMIT_RING, OURS, QSD, RING

WIDTH, LEFT, RIGHT, TOP = 880, 350, 60, 64
BAR, GAP = 11, 9  # heights: of a bar, and between lines
COLORS = {OURS: 'ours', RING: 'ring'}
LIMITS = {OURS: LIMIT, RING: LIMIT_RING}
STYLE = '''
  text { font: 12px system-ui, sans-serif; fill: #24292f }
  .small { font-size: 11px; fill: #57606a }
  .title { font-size: 15px; font-weight: 600 }
  .grid { stroke: #d0d7de } .one { stroke: #57606a }
  .ours { fill: #2f81f7 } .ring { fill: #1a9c6b } .limit { stroke: #cf222e; stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 }
    .grid { stroke: #30363d } .one { stroke: #9198a1 } .limit { stroke: #ff7b72 }
  }
'''


class Scale:
    """Logarithmic: twice as fast is as far to the right of "as fast" as half as fast is to the left."""

    def __init__(self, ratios):
        self.low = math.floor(math.log2(min([1, *ratios])))
        self.high = max(math.ceil(math.log2(max([2, *ratios]))), self.low + 1)

    def x(self, ratio):
        share = (math.log2(ratio) - self.low) / (self.high - self.low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def marks(self):
        return [2.0 ** power for power in range(self.low, self.high + 1)]


def rows_of(line):
    """(side, its ratio to the peer, the limit's or None) for each bar of a line."""
    for side in (OURS, RING):
        for ratio in line['ratios']:
            if (ratio['of'], ratio['to']) == (side, QSD):
                limit = line['sides'].get(LIMITS[side])
                peer = line['sides'][QSD]['median']
                yield side, ratio['median'], limit['median'] / peer if limit else None


def svg(machine, lines):
    """Lines in which more is better, where the peer was measured too."""
    drawn = [(line, bars) for line in lines if not line['less_is_better'] and (bars := list(rows_of(line)))]
    scale = Scale([number for _, bars in drawn for _, *numbers in bars for number in numbers if number])
    height = TOP + sum(BAR * len(bars) + GAP for _, bars in drawn) + 46
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">' % (
        WIDTH, height, WIDTH, height), '<title>imgfuse against qemu-storage-daemon</title>', '<style>%s</style>' % STYLE]
    parts += legend()
    parts += grid(scale, height - 40)
    top = TOP
    for line, bars in drawn:
        parts += bars_of(line, bars, top, scale)
        top += BAR * len(bars) + GAP
    parts.append(text(10, height - 10, machine_text(machine), 'small'))
    return '\n'.join(parts + ['</svg>', ''])


def text(x, y, content, kind='', anchor='start'):
    return '<text x="%.1f" y="%.1f" class="%s" text-anchor="%s">%s</text>' % (x, y, kind, anchor, escape(content))


def legend():
    parts = [text(10, 20, "Times the speed of QEMU's FUSE export (qemu-storage-daemon)", 'title')]
    for x, kind, words in ((10, 'ours', 'imgfuse'), (90, 'ring', 'imgfuse, FUSE over io_uring')):
        parts += ['<rect x="%d" y="30" width="10" height="10" class="%s"/>' % (x, kind), text(x + 16, 39, words, 'small')]
    parts.append('<line x1="276" x2="276" y1="29" y2="41" class="limit"/>')
    parts.append(text(286, 39, 'the limit: a FUSE file without a format, same transport', 'small'))
    return parts


def grid(scale, bottom):
    parts = []
    for mark in scale.marks():
        x = scale.x(mark)
        parts.append('<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" class="%s"/>' % (
            x, x, TOP - 4, bottom, 'one' if mark == 1 else 'grid'))
        parts.append(text(x, TOP - 8, '%g×' % mark, 'small', 'middle'))
    return parts


def bars_of(line, bars, top, scale):
    parts = [text(LEFT - 10, top + BAR * len(bars) / 2 + 4, line['name'], anchor='end')]
    for number, (side, ratio, limit) in enumerate(bars):
        y = top + number * BAR
        begin, end = sorted((scale.x(1), scale.x(ratio)))
        parts.append('<rect x="%.1f" y="%.1f" width="%.1f" height="%d" class="%s"/>' % (
            begin, y, max(end - begin, 1), BAR - 1, COLORS[side]))
        parts.append(text(WIDTH - 10, y + BAR - 2, '%.2f' % ratio if ratio < 10 else '%.1f' % ratio, 'small', 'end'))
        if limit:
            parts.append('<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" class="limit"/>' % (
                scale.x(limit), scale.x(limit), y - 1, y + BAR))
    return parts
