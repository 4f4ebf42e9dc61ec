"""W&B as a logger."""

import pytest

from penstock.lightning_modules.loggers import WandB


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_a_run_ends_with_a_table_of_its_last_values(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("RUN_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger, tables = WandB(), []
    monkeypatch.setattr(logger, "log_table", lambda key, columns, data: tables.append((key, columns, data)))
    logger.experiment.summary.update({"accuracy": 0.5, "note": "text"})
    logger.finalize("success")
    logger.experiment.finish()
    ((key, columns, data),) = tables
    assert (key, columns) == ("summary", ["metric", "value"])
    assert ["accuracy", 0.5] in data
    assert "note" not in [name for name, _ in data]
