"""Includes go one way: include <- base <- storage <- core <- format/* <- open; fuse and the tools stay outside."""
import re
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What a layer may include besides itself. "format" is what lies beside the formats, such as the registry.
BELOW_FORMATS = {'include', 'base', 'storage', 'core'}
FORMATS = {'format/raw', 'format/qcow2', 'format/qed', 'format/fvd'}
BESIDE_CORE = {'include', 'base', 'core/range_lock.h', 'core/bitmap.h'}
ALLOWED = {
    'include': set(),
    'base': {'include'},
    'storage': {'include', 'base'},
    'core': {'include', 'base', 'storage'},
    **{name: BELOW_FORMATS | {'format'} for name in FORMATS},
    'format': BELOW_FORMATS | FORMATS,
    'open': BELOW_FORMATS | FORMATS | {'format', 'layer'},
    'layer': BESIDE_CORE,
    'job': BESIDE_CORE | {'layer'},
    'control': {'include', 'base'},
    'fuse': {'include', 'base', 'control'},
    'tools': {'include', 'control', 'fuse'},
}

# Libraries that stay behind one door.
DOORS = {
    'fuse_lowlevel.h': 'src/fuse/',
    'fuse.h': 'src/fuse/',
    'fuse3/fuse_lowlevel.h': 'src/fuse/',
    'zlib.h': 'src/core/codec',
    'libdeflate.h': 'src/core/codec',
    'zstd.h': 'src/core/codec',
}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def sources():
    for folder in ('include', 'src', 'tools'):
        for path in sorted((ROOT / folder).rglob('*')):
            if path.suffix in ('.h', '.cc'):
                yield path


def includes(path):
    return INCLUDE.findall(path.read_text(encoding='utf-8'))


def layer_of(path):
    parts = path.relative_to(ROOT).parts
    if parts[0] != 'src':
        return parts[0]
    if parts[1] == 'format' and len(parts) > 3:
        return 'format/' + parts[2]
    return parts[1]


def find(name, includer):
    for folder in (includer.parent, ROOT / 'src', ROOT / 'include'):
        if (folder / name).is_file():
            return (folder / name).resolve()
    return None


def may_include(includer, included):
    allowed = ALLOWED[layer_of(includer)] | {layer_of(includer)}
    return layer_of(included) in allowed or str(included.relative_to(ROOT)).removeprefix('src/') in allowed


class Includes(unittest.TestCase):
    def test_the_sources_are_there(self):
        self.assertGreater(len(list(sources())), 20)

    def test_every_layer_is_known(self):
        unknown = {layer_of(path) for path in sources()} - set(ALLOWED)
        self.assertEqual(unknown, set())

    def test_every_quoted_include_is_a_file_of_the_project(self):
        missing = [f'{path.relative_to(ROOT)}: "{name}"' for path in sources() for kind, name in includes(path)
                   if kind == '"' and find(name, path) is None]
        self.assertEqual(missing, [])

    def test_a_layer_includes_only_the_layers_below_it(self):
        wrong = []
        for path in sources():
            for kind, name in includes(path):
                included = find(name, path) if kind == '"' else None
                if included is not None and not may_include(path, included):
                    wrong.append(f'{path.relative_to(ROOT)} includes "{name}"')
        self.assertEqual(wrong, [])

    def test_libraries_with_a_door_are_included_only_there(self):
        wrong = []
        for path in sources():
            relative = str(path.relative_to(ROOT))
            for _, name in includes(path):
                if name in DOORS and not relative.startswith(DOORS[name]):
                    wrong.append(f'{relative} includes {name}, which belongs in {DOORS[name]}')
        self.assertEqual(wrong, [])


if __name__ == '__main__':
    unittest.main()
