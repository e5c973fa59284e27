"""Attributes of a trainer that are fields of its config, under the names that upstream's callers read."""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T", bound=type)


class Setting:
    """A field of the trainer's config as an attribute of the trainer. Reading and setting go to the config, so that
    there is one value; a field that is used up when the trainer is made cannot be set afterwards."""

    def __init__(self, field: str, fixed: bool) -> None:
        self.field, self.fixed = field, fixed

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        if trainer is None:
            return self
        if "args" not in vars(trainer):  # a subclass may keep a value of its own before the trainer is made
            return vars(trainer)[self.name]
        return getattr(trainer.args, self.field)

    def __set__(self, trainer: Any, value: Any) -> None:
        if "args" not in vars(trainer):
            vars(trainer)[self.name] = value
        elif not self.fixed:
            setattr(trainer.args, self.field, value)
        elif value != getattr(trainer.args, self.field):
            raise AttributeError(
                f"{type(trainer).__name__}.{self.name} is fixed when the trainer is made: set {self.field} in the "
                "config that makes it"
            )


def shows(*fields: str, fixed: tuple[str, ...] = (), **renamed: str) -> Callable[[T], T]:
    """Gives a trainer its config's `fields` as attributes, and `renamed` ones (attribute=field); those that are `fixed`
    can be read alone. What the class has under such a name stays."""

    def give(trainer: T) -> T:
        for name, field in {**{each: each for each in (*fields, *fixed)}, **renamed}.items():
            if name not in vars(trainer):
                setting = Setting(field, fixed=field in fixed)
                setting.__set_name__(trainer, name)
                setattr(trainer, name, setting)
        return trainer

    return give
