"""What the objects have in common that take the place of a module's `forward`."""

import copy
from typing import Any


class Replacement:
    """Knows the module it is in, so that a copy of the model has copies of its own; the kernels there are once."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = memo[id(self)] = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(new, name, value if name == "kernels" else copy.deepcopy(value, memo))
        return new
