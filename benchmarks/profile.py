# SPDX-License-Identifier: Apache-2.0
"""Nsight Compute on exactly one decode launch of a case of decode.py, as rows beside its own.

python benchmarks/profile.py 8x8x4@131072 --output benchmarks/results/profile_h200.json

The script runs itself under ncu: the child makes cold caches, warms up, and calls decode once
inside an NVTX range; the range is what ncu profiles. ncu repeats the launch in several passes, so
`profiled_us` is no benchmark: the time is decode.py's.
"""

from __future__ import annotations

import sys

if __name__ != "__main__":
    # cProfile, which torch imports, wants the standard library's module of this name and finds this
    # one, because a script's folder comes first in sys.path.
    import importlib.util
    import sysconfig

    _path = f"{sysconfig.get_path('stdlib')}/profile.py"
    _spec = importlib.util.spec_from_file_location("profile", _path)
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules[__name__] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
else:
    import profile_decode

    profile_decode.main()
