"""What pip runs beside pyproject.toml: with MFAC_CUDA=1 the CUDA extension is built too."""

import os
import sys
from pathlib import Path

from setuptools import setup

arguments = {}
if os.environ.get("MFAC_CUDA") == "1":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import setup_cuda

    try:
        arguments = setup_cuda.extension()
    except setup_cuda.CannotBuildError as error:
        sys.exit(f"MFAC_CUDA=1, but {error}")
setup(**arguments)
