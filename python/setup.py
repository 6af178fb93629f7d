# SPDX-License-Identifier: Apache-2.0
"""Builds the C library with CMake into libentmax/_lib of the wheel, and tags the wheel py3-none-PLATFORM: the package reaches the
library through ctypes, so one wheel serves every Python 3. OpenBLAS is linked statically; libjansson, whose archive is not
position independent on Debian, lies beside the library, which finds it by $ORIGIN. Run from a source tree: the C sources are
those of the folder above."""
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent.parent
JOBS = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))


def version():
    header = (ROOT / "include" / "emx.h").read_text(encoding="utf-8")
    return ".".join(re.findall(r"^#define EMX_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header, re.M))


def soname(library):
    dynamic = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    return re.search(r"SONAME.*\[(.*)\]", dynamic).group(1)


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):  # an editable install takes LIBENTMAX_LIBRARY, or the system's library
            self.build_library(Path(self.build_lib) / "libentmax" / "_lib")

    def build_library(self, target):
        build = Path(self.get_finalized_command("build").build_temp).resolve() / "cmake"
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-DEMX_TESTS=OFF", "-DEMX_STATIC_BLAS=ON"]
        subprocess.run(configure + os.environ.get("CMAKE_ARGS", "").split(), check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "entmax", "entmax_model", "-j", JOBS], check=True)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        model = build / "libentmax_model.so"
        for library in (build / "libentmax.so", model):
            copy = target / soname(library)
            shutil.copyfile(library, copy)
            subprocess.run(["strip", "--strip-unneeded", str(copy)], check=True)
        # What the model library needs beyond libc, and the terms that its parts come under.
        for name, path in re.findall(r"(libjansson\S*) => (\S+)", subprocess.run(
                ["ldd", str(model)], check=True, capture_output=True, text=True).stdout):
            shutil.copyfile(path, target / name)
        for part in ("libjansson*", "libopenblas*-pthread*"):
            for notice in sorted(Path("/usr/share/doc").glob(part + "/copyright"))[:1]:
                shutil.copyfile(notice, target / ("copyright-" + re.match(r"lib[a-z]+", notice.parent.name).group()))


class PlatformWheel(bdist_wheel):
    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(version=version(), distclass=BinaryDistribution, cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel})
