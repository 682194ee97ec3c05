#!/usr/bin/env python3
"""Runs the unittest files of a folder and ends with the line "N passed, N failed".

    run.py FOLDER [-k PATTERN]…      the names of tests are matched as unittest does
"""
import argparse
import os
import sys
import time
import unittest


class Result(unittest.TextTestResult):
    """Prints every test with its time; a skipped test counts as failed, since it did not run."""

    def startTest(self, test):
        self.began = time.monotonic()
        super().startTest(test)

    def stopTest(self, test):
        super().stopTest(test)
        self.stream.writeln('    %.1f s' % (time.monotonic() - self.began))

    def failures_of_all_kinds(self):
        return len(self.failures) + len(self.errors) + len(self.skipped) + len(self.unexpectedSuccesses)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder')
    parser.add_argument('-k', action='append', default=[], dest='patterns', metavar='PATTERN')
    arguments = parser.parse_args()

    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    loader = unittest.TestLoader()
    if arguments.patterns:
        loader.testNamePatterns = [p if '*' in p else '*%s*' % p for p in arguments.patterns]
    tests = loader.discover(arguments.folder, pattern='test_*.py', top_level_dir=arguments.folder)
    runner = unittest.TextTestRunner(stream=sys.stdout, resultclass=Result, verbosity=2)
    result = runner.run(tests)
    failed = result.failures_of_all_kinds()
    print('%d passed, %d failed' % (max(result.testsRun - failed, 0), failed), flush=True)
    return 1 if failed or not result.testsRun else 0


if __name__ == '__main__':
    sys.exit(main())
