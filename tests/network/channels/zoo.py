"""The zoo: every architecture the channel groups are tested on (`ZOO`, `build`)."""

import zoo_layers  # noqa: F401
import zoo_recurrent  # noqa: F401
import zoo_transformers  # noqa: F401
from zoo_base import ZOO, build

__all__ = ["ZOO", "build"]
