"""Measures imgfuse beside QEMU's FUSE export, beside a plain file, and beside the limit: a FUSE file without a format.

Every line is measured in rounds, one side after the other. Only ratios of one run mean something on a machine that does
other things too. README.md says what each line is. Needs root, fio, strace and QEMU's tools.
"""
import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import chart
import command_lines
import costs
import counts
import disk_lines
import report
from host import Failure, RingsAllowed, describe, has_program, release
from images import Store
from results import summary
from rounds import Bench, Progress, measure_all
from sides import Imgfuse, find_programs, stop_all

LINES = disk_lines.LINES + command_lines.LINES + counts.LINES + costs.LINES
NEEDED = ('fio', 'strace', 'qemu-img', 'qemu-io', 'losetup', 'mkfs.ext4')


def parse_arguments():
    parser = argparse.ArgumentParser(prog='tools/bench/run', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, metavar='N', help='default 5')
    parser.add_argument('--seconds', type=float, metavar='N', help='of each measurement that has no end, default 0.8')
    parser.add_argument('--quick', action='store_true', help='3 rounds of half a second, and less data')
    parser.add_argument('--only', action='append', metavar='WORD', help='the lines with this word; may be repeated')
    parser.add_argument('--list', action='store_true', help='print the names of the lines, and end')
    parser.add_argument('--json', metavar='FILE', type=Path, help='everything that was measured')
    parser.add_argument('--markdown', metavar='FILE', type=Path, help='a table')
    parser.add_argument('--svg', metavar='FILE', type=Path, help='a chart of the ratios')
    parser.add_argument('--folder', metavar='FOLDER', type=Path, default=Path('/var/tmp'),
                        help='where the images lie while it runs, some 6 GiB; default /var/tmp')
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 5)
    arguments.seconds = arguments.seconds or (0.5 if arguments.quick else 0.8)
    return arguments


def chosen(words):
    return [line for line in LINES if not words or any(word.lower() in line.name.lower() for word in words)]


def check_machine():
    if os.geteuid() != 0:
        raise Failure('root is needed, for loop devices and dropped pages')
    absent = [program for program in NEEDED if not has_program(program)]
    if absent:
        raise Failure('not installed: ' + ', '.join(absent))
    find_programs()


def measure(lines, arguments):
    """The summaries of what was measured, and the names of the lines that failed."""
    folder, memory = (Path(tempfile.mkdtemp(prefix='imgfuse-bench-', dir=parent)).resolve()
                      for parent in (arguments.folder, '/dev/shm'))
    bench = Bench(Store(folder, memory, arguments.quick), arguments.rounds, arguments.seconds)
    print(report.text_head(), flush=True)
    try:
        with RingsAllowed():
            results, failed = measure_all(lines, bench, Progress(lines, bench),
                                          lambda result: print(report.text_of(summary(result)), flush=True))
    finally:
        stop_all()
        release(folder)
        for images in (folder, memory):
            shutil.rmtree(images, ignore_errors=True)
    return [summary(result) for result in results], failed


def write_files(arguments, machine, summaries):
    if arguments.json:
        write(arguments.json, report.as_json(machine, arguments.rounds, arguments.seconds, summaries))
    if arguments.markdown:
        write(arguments.markdown, report.markdown(machine, summaries))
    if arguments.svg:
        write(arguments.svg, chart.svg(machine, summaries))


def write(path, text):
    path.write_text(text, encoding='utf-8')


def main():
    arguments = parse_arguments()
    lines = chosen(arguments.only)
    if arguments.list:
        print('\n'.join(line.name for line in lines))
        return 0
    if not lines:
        raise Failure('no line has the word "%s"; --list shows them all' % '" or "'.join(arguments.only))
    check_machine()
    machine = describe(Imgfuse.program)
    print(report.machine_text(machine))
    summaries, failed = measure(lines, arguments)
    print('%d of %d wanted ratios and bounds met' % report.totals(summaries))
    write_files(arguments, machine, summaries)
    if failed:
        print('FAILED: ' + '; '.join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped'))
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit('tools/bench/run: %s' % failure)
    except KeyboardInterrupt:
        sys.exit('stopped')
