"""The folder of a paper's training: a run with a record, stages and options of its own."""

from memory import Plan, require_memory
from run import Run, is_used, read_record, with_flags


class PaperRun(Run):
    """A Run whose class names its `record`, its `stages` and its `options_type`."""

    def plan(self, stage):
        """What the flags say; only so much memory is required that large numbers are refused."""
        batch_size = getattr(self.options, f"{stage}_batch_size")
        frames = batch_size * getattr(self.options, "num_frames", 1)
        require_memory(2**16 * frames, f"--{stage}-batch-size or --num-frames")
        checkpointing = bool(getattr(self.options, "gradient_checkpointing", False))
        return Plan(checkpointing, moments_on_cpu=self.options.offload)

    @classmethod
    def open(cls, path, given, resume):
        """The run of a folder, new or resumed, with the flags given."""
        known = (path / cls.record).exists()
        if not known and is_used(path):
            raise ValueError(f"{path}: is not empty and no run of this command; choose a new "
                             "folder")
        old, finished = read_record(path, cls) if known else (cls.options_type(), [])
        begun = cls.stages[: len(finished) + (path / "training_state.pt").exists()]
        return cls(path, with_flags(path, old, given, cls.stages, begun), finished, resume)
