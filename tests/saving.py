"""A checkpoint in the middle of a run."""

from lightning.pytorch import Callback


class Save(Callback):
    """Writes a checkpoint after so many steps."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
