"""Settings that every test shares."""

import os

# Before torch is imported: OpenMP's busy waiting slows everything down when two things run at once.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
