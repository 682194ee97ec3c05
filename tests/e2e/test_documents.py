"""What is installed, and what the documents say."""
import os
import re
import unittest
from pathlib import Path

from harness import IMGFUSE, ROOT, ImageCase, attempt, run

MAN = ROOT / 'packaging/man'
COMMANDS = ('mount', 'umount', 'create', 'snapshot', 'bitmap', 'amend', 'info', 'map', 'check', 'convert', 'compare',
            'measure', 'bench', 'resize', 'commit', 'rebase', 'mirror', 'backup', 'stream', 'jobs', 'job', 'list', 'status')


def plain(page):
    """The page as text with one space between words, and hyphens as they are typed."""
    text = run('man', '-l', '-E', 'ascii', page, env=dict(os.environ, MANWIDTH='10000'))
    return re.sub(r'\s+', ' ', re.sub('.\b', '', text))


class ManPages(ImageCase):
    def test_each_command_has_one_that_names_every_long_option(self):
        for command in COMMANDS:
            with self.subTest(command):
                page = plain(MAN / ('imgfuse-%s.1' % command))
                for option in re.findall(r'(--[a-z][a-z-]+)', run(IMGFUSE, command, '--help')):
                    if option not in ('--help', '--version'):
                        self.assertIn(option, page)

    def test_they_name_no_option_that_does_not_exist(self):
        for command in COMMANDS:
            with self.subTest(command):
                known = run(IMGFUSE, command, '--help')
                options = plain(MAN / ('imgfuse-%s.1' % command)).split(' OPTIONS ')[1].split(' EXIT STATUS ')[0]
                for option in re.findall(r'(--[a-z][a-z-]+)', options):
                    self.assertIn(option, known)

    def test_examples_come_first_and_the_source_has_no_error(self):
        for page in sorted(MAN.iterdir()):
            with self.subTest(page.name):
                headings = re.findall(r'^\.SH (.*)$', page.read_text(encoding='utf-8'), re.MULTILINE)
                self.assertEqual(headings[:3], ['NAME', 'SYNOPSIS', 'EXAMPLES'])
                outcome = attempt('man', '--warnings', '-E', 'UTF-8', '-l', '-Tutf8', page)
                self.assertEqual((outcome.status, outcome.err), (0, ''))


class Installation(ImageCase):
    def test_program_pages_completion_and_mount_helper_are_installed(self):
        run('meson', 'install', '-C', Path(IMGFUSE).resolve().parents[2], '--no-rebuild', '--destdir', self.folder)
        installed = {str(path.relative_to(self.folder)) for path in self.folder.rglob('*')}
        for name in ('bin/imgfuse', 'share/man/man1/imgfuse.1', 'share/man/man8/mount.imgfuse.8',
                     'share/bash-completion/completions/imgfuse', 'sbin/mount.imgfuse'):
            self.assertTrue(any(path.endswith(name) for path in installed), name)
        helper = self.folder / 'usr/sbin/mount.imgfuse'
        self.assertTrue((self.folder / os.readlink(helper).lstrip('/')).exists())

    def test_the_completion_is_a_shell_script_that_knows_every_command(self):
        script = ROOT / 'packaging/completions/imgfuse'
        run('bash', '-n', script)
        for command in COMMANDS:
            self.assertIn(command, script.read_text(encoding='utf-8'))


class Readme(ImageCase):
    def test_files_that_it_names_are_there(self):
        for document in ('README.md', 'tests/README.md'):
            text = (ROOT / document).read_text(encoding='utf-8')
            for name in re.findall(r'`((?:include|src|tests|tools|packaging)/[\w./-]+)`', text):
                self.assertTrue((ROOT / name).exists(), '%s names %s' % (document, name))


if __name__ == '__main__':
    unittest.main()
