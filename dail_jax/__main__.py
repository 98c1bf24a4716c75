"""`python -m dail_jax` is the command `dail`."""

import sys

from dail_jax.launch import console

sys.exit(console())
