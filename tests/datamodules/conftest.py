from types import SimpleNamespace

import pytest


@pytest.fixture
def attach():
    """Gives a DataModule what it reads of a trainer: rank, world, stage and epoch."""

    def give(data, *, rank=0, world=1, training=True, epoch=0, overfit_batches=0):
        shared = {"rank": rank, "num_replicas": world} if world > 1 else None
        data.trainer = SimpleNamespace(
            distributed_sampler_kwargs=shared, training=training, current_epoch=epoch, overfit_batches=overfit_batches
        )
        return data

    return give
