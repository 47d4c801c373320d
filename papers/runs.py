"""The folder of a paper's training: a run with a record and stages of its own."""

import dataclasses
from pathlib import Path

from files import read_json
from run import Run


class PaperRun(Run):
    """A Run whose class names its record, its stages and its options' class."""

    record, stages, options_class = "", (), None

    @classmethod
    def read(cls, path):
        """(options, finished stages) of a run, from its record."""
        stored = read_json(Path(path) / cls.record)
        try:
            finished = stored["finished"]
            if finished != list(cls.stages[: len(finished)]):
                raise ValueError(f"finished stages {finished}")
            return cls.options_class(**stored["options"]), finished
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{Path(path) / cls.record}: damaged, or of another version "
                             f"({error})") from None

    @classmethod
    def options_of(cls, path):
        """The options of a run."""
        return cls.read(path)[0]

    @classmethod
    def open(cls, path, given, resume):
        """The run of a folder, new or resumed, with the flags given."""
        known = (path / cls.record).exists()
        if not known and path.exists() and any(path.iterdir()):
            raise ValueError(f"{path}: is not empty and no run of this command; choose a new "
                             "folder")
        old, finished = cls.read(path) if known else (cls.options_class(), [])
        begun = finished or (path / "training_state.pt").exists()
        for field in dataclasses.fields(old):
            value = getattr(old, field.name)
            if begun and given.get(field.name, value) != value and not field.metadata.get("free"):
                raise ValueError(f"{path} was trained with --{field.name.replace('_', '-')} "
                                 f"{value}, not {given[field.name]}; choose a new folder for other "
                                 "options")
        return cls(path, dataclasses.replace(old, **given), finished, resume)
