"""Python imports this first where PYTHONPATH begins with this folder: it installs the stand-in."""

import os
import sys
from pathlib import Path

if os.environ.get("DITF_STANDIN_PLANS"):
    sys.path.insert(0, str(Path(__file__).parent.parent.parent.parent))
    from tests.standin.install import install_in_process, world_of_environment
    from tests.standin.modules import VERSION

    install_in_process(world_of_environment(), os.environ.get(VERSION))
