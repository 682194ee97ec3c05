"""Every rule of RULES.md has a test, and every test that it names exists."""
import re
import unittest
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
WANTED = {str(n) for n in range(1, 101)} | {'q%d' % n for n in range(1, 61)} | {'e%d' % n for n in range(1, 16)} | \
    {'f%d' % n for n in range(1, 19)} | {'qed', 'fvd', 'mirror', 'chain'}

ROW = re.compile(r'^\| ([qef]?\d+|[a-z]+) \| (.+) \| (.+) \|$', re.MULTILINE)
NAMED = re.compile(r'`([^`]+)`: `([^`]+)`')
CASE = re.compile(r'TEST_CASE(?:_TEMPLATE)?\(\s*((?:"(?:[^"\\]|\\.)*"\s*)+)[,)]')


def rows():
    return [row for row in ROW.findall((TESTS / 'RULES.md').read_text(encoding='utf-8')) if row[0] != 'rule']


def names_in(file):
    """The tests of a file; none if it is not there."""
    path = TESTS / file
    text = path.read_text(encoding='utf-8') if path.is_file() else ''
    if path.suffix == '.py':
        return set(re.findall(r'def (test_\w+)\(', text))
    return {''.join(re.findall(r'"((?:[^"\\]|\\.)*)"', case)) for case in CASE.findall(text)}


class Rules(unittest.TestCase):
    def test_every_rule_is_there_once(self):
        self.assertEqual(sorted(number for number, _, _ in rows()), sorted(WANTED))

    def test_every_rule_has_a_test(self):
        bare = [number for number, _, tests in rows() if not NAMED.search(tests)]
        self.assertEqual(bare, [])

    def test_every_test_that_is_named_exists(self):
        missing = ['rule %s: %s has no "%s"' % (number, file, name) for number, _, tests in rows()
                   for file, name in NAMED.findall(tests) if name not in names_in(file)]
        self.assertEqual(missing, [])

    def test_every_test_with_a_number_is_named_by_its_rule(self):
        named = {(file, name) for _, _, tests in rows() for file, name in NAMED.findall(tests)}
        stray = ['%s: %s' % (path.relative_to(TESTS), name) for path in TESTS.rglob('*_test.cc')
                 for name in names_in(path) if re.match(r'rules? [qe]?\d', name)
                 and (str(path.relative_to(TESTS)), name) not in named]
        self.assertEqual(stray, [])


if __name__ == '__main__':
    unittest.main()
