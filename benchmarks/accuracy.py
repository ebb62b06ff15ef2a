# SPDX-License-Identifier: Apache-2.0
"""The accuracy bench (benchmarks/accuracy/): recipes on real models and texts, through the cache.

python benchmarks/accuracy.py --output benchmarks/results/accuracy_h200.json
python benchmarks/accuracy.py --few              the recipes that bear on the targets
python benchmarks/accuracy.py --reduced          SmolLM2, short, minutes on a CPU

A file is resumed: what it has is not measured again. --models, --texts, --recipes and --kinds
choose a part, --minutes ends a run between two units of work (exit status 3).
"""

import sys

from accuracy.command import main

if __name__ == "__main__":
    sys.exit(main())
