"""Counts the cases in a log that `meson test` wrote (JSON, a line for each test program): those that doctest reports, or
one for a program of another kind."""
import json
import re
import sys

SUMMARY = re.compile(r'\[doctest\] test cases:\s*\d+\s*\|\s*(\d+) passed\s*\|\s*(\d+) failed')


def count(path):
    passed = failed = 0
    with open(path, encoding='utf-8') as log:
        for line in log:
            program = json.loads(line)
            summaries = SUMMARY.findall(re.sub(r'\x1b\[[0-9;]*m', '', program.get('stdout') or ''))
            good = sum(int(p) for p, _ in summaries)
            bad = sum(int(f) for _, f in summaries)
            if program['result'] != 'OK' and bad == 0:
                bad = 1  # it crashed, leaked or ran out of time
            elif not summaries:
                good = 1
            passed += good
            failed += bad
    return passed, failed


if __name__ == '__main__':
    print('{} passed, {} failed'.format(*count(sys.argv[1])))
