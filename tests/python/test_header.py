# SPDX-License-Identifier: Apache-2.0
"""The mirror of the C interface in _c.py says what the headers say."""
import ctypes
import os
import re
import subprocess
import tempfile
import unittest
from pathlib import Path

from libentmax import _c

INCLUDE = Path(__file__).resolve().parents[2] / "include"


class Header(unittest.TestCase):
    def test_structs_and_constants(self):
        lines, here = [], {}
        for name, struct in _c.STRUCTS.items():
            lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
            here[name] = ctypes.sizeof(struct)
            for field, *_ in struct._fields_:
                member = f"{name}.{field}"
                lines.append(f'printf("{member} %zu\\n", offsetof({name}, {field}) * 1000 + sizeof((({name} *)0)->{field}));')
                here[member] = getattr(struct, field).offset * 1000 + getattr(struct, field).size
        for name, value in _c.CONSTANTS.items():
            lines.append(f'printf("{name} %d\\n", (int){name});')
            here[name] = value
        program = "#include <stdio.h>\n#include <emx_model.h>\nint main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
        with tempfile.TemporaryDirectory() as folder:
            source, binary = Path(folder, "sizes.c"), Path(folder, "sizes")
            source.write_text(program)
            subprocess.run([os.environ.get("CC", "cc"), "-std=c11", f"-I{INCLUDE}", str(source), "-o", str(binary)], check=True)
            output = subprocess.run([str(binary)], check=True, capture_output=True, text=True).stdout
        there = {name: int(number) for name, number in map(str.split, output.splitlines())}
        self.assertEqual(here, there)

    def test_fields_are_the_headers(self):
        """No field is missing in between or under another name: sizes alone would not notice two that changed places."""
        text = re.sub(r"/\*.*?\*/", "", (INCLUDE / "emx.h").read_text() + (INCLUDE / "emx_model.h").read_text(), flags=re.S)
        for name, struct in _c.STRUCTS.items():
            body = re.search(r"typedef struct %s \{(.*?)\} %s;" % (name, name), text, re.S).group(1)
            fields = [re.search(r"(\w+)(?:\[\w+\])?\s*$", part).group(1) for part in re.split(r"[;,]", body) if part.strip()]
            self.assertEqual(fields, [field[0] for field in struct._fields_], name)

    def test_prototypes(self):
        text = re.sub(r"/\*.*?\*/", "", (INCLUDE / "emx.h").read_text() + (INCLUDE / "emx_model.h").read_text(), flags=re.S)
        kinds = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "size_t": ctypes.c_size_t, "emx_status": ctypes.c_int32,
                 "emx_progress_fn": _c.Progress}
        for function, (restype, argtypes) in {**_c.CORE, **_c.MODEL}.items():
            found = re.search(r"EMX_API ([\w ]+?[ *]+)%s\(([^)]*)\);" % function, text)
            self.assertIsNotNone(found, function)
            parameters = [] if found.group(2).strip() == "void" else found.group(2).split(",")
            self.assertEqual(len(parameters), len(argtypes), function)
            for parameter, argtype in zip(parameters, argtypes):
                kind = re.sub(r"\s*\w+$", "", parameter.replace("const ", "").strip())
                if "*" not in kind:
                    self.assertIs(argtype, kinds[kind], f"{function}: {parameter}")
                else:
                    base = kind.rstrip("* ")
                    pointee = getattr(argtype, "_type_", None)
                    if kind.count("*") == 1 and base in _c.STRUCTS:
                        self.assertIs(pointee, _c.STRUCTS[base], f"{function}: {parameter}")
                    elif kind.count("*") == 1 and base in kinds:
                        self.assertIs(pointee, kinds[base], f"{function}: {parameter}")
                    else:  # handles, strings, buffers
                        self.assertEqual(ctypes.sizeof(argtype), ctypes.sizeof(ctypes.c_void_p), f"{function}: {parameter}")
            returned = found.group(1).strip()
            expected = {"void": None, "emx_status": ctypes.c_int32, "int32_t": ctypes.c_int32, "const char *": ctypes.c_char_p}
            self.assertIs(restype, expected[returned], function)


if __name__ == "__main__":
    unittest.main()
