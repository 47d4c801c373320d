"""The folder of a paper's training: a run with one stage and a record of its own."""

import dataclasses
from pathlib import Path

from files import read_json
from run import Run


class PaperRun(Run):
    """A Run whose class names its options' class and the file or folder that is written last."""

    record, stages, options_class, result = "", (), None, ""

    @classmethod
    def options_of(cls, path):
        """The options of a run, from its record."""
        stored = read_json(Path(path) / cls.record)
        try:
            return cls.options_class(**stored["options"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{Path(path) / cls.record}: damaged, or of another version "
                             f"({error})") from None

    @classmethod
    def open(cls, path, given, resume):
        """The run of a folder, new or resumed, with the flags given."""
        finished = list(cls.stages) if (path / cls.result).exists() else []
        known = (path / cls.record).exists()
        begun = known and (finished or (path / "training_state.pt").exists())
        if not known and path.exists() and any(path.iterdir()):
            raise ValueError(f"{path}: is not empty and no run of this command; choose a new "
                             "folder")
        old = cls.options_of(path) if known else cls.options_class()
        for field in dataclasses.fields(old):
            value = getattr(old, field.name)
            if begun and given.get(field.name, value) != value and not field.metadata.get("free"):
                raise ValueError(f"{path} was trained with --{field.name.replace('_', '-')} "
                                 f"{value}, not {given[field.name]}; choose a new folder for other "
                                 "options")
        return cls(path, dataclasses.replace(old, **given), finished, resume)
