"""STARFlow: "Scaling Latent Normalizing Flows for High-resolution Image Synthesis" (arXiv 2506.06276); TARFlow."""

from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from penstock.lightning_modules.autoregressive_module import AutoregressiveModule, CacheType
from penstock.lightning_modules.flow.affine import Guidance
from penstock.lightning_modules.flow.inverse import Inverse
from penstock.lightning_modules.nets.autoencoder import Autoencoder
from penstock.lightning_modules.nets.autoregressive_flow import AutoregressiveFlow
from penstock.lightning_modules.nets.text_encoder import TextEncoder


class STARFlow(AutoregressiveModule):
    """An autoregressive flow trained by maximum likelihood on data with noise: `mean(z^2) / 2 + sum mean(log sigma)`.

    With `nets.starflow.STARFlow` as network this is STARFlow, with `nets.tarflow.TARFlow` its ancestor
    (arXiv 2412.06329), whose guidance is `flow.affine.LinearGuidance`.

    Args:
        net: The flow.
        optimizer: Makes the optimiser from the parameters.
        scheduler: Makes a learning-rate scheduler that is stepped after every optimiser step.
        noise: Standard deviation of what is added to the data, which the model then is of: 0.3 in the paper; 0 for
            dequantised data whose likelihood is asked for.
        penalty: Weight of the mean squares of the noisy data and of what the shallow blocks make of it.
        condition_dropout: Share of the rows whose condition is dropped, in [0, 1].
        guidance: Of the sampler, where there is a condition; None does without.
        inverse: How the deep block is inverted; None is `Jacobi`.
        shallow: How the others are, all alike or each by its own, data side first; None is as the deep one.
        cache: Precision of the caches of keys and values when sampling; None is that of the weights.
        denoise: Whether samples lose the noise by a step along the gradient of the likelihood.
        key: Entry of the batch that holds the data, where no `text` is given.
        initial: Checkpoint whose raw weights training starts from.
        text: Makes this a text-to-image flow: prompts (batch entry `text`) to features.
        autoencoder: With `text`, images to the flow's space and back; None is pixel space.
        prompts: With `text`, prompts by number, for samples that ask for a class.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        net: AutoregressiveFlow,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        noise: float = 0.3,
        penalty: float = 1e-4,
        condition_dropout: float = 0.1,
        guidance: Guidance | None = None,
        inverse: Inverse | None = None,
        shallow: Inverse | list[Inverse] | None = None,
        cache: CacheType | None = None,
        denoise: bool = True,
        key: Literal["image", "video", "latent"] = "image",
        initial: str | None = None,
        text: TextEncoder | None = None,
        autoencoder: Autoencoder | None = None,
        prompts: list[str] | None = None,
    ):
        super().__init__(
            net, optimizer, scheduler, noise, penalty, condition_dropout, guidance, inverse, shallow, cache, denoise,
            key, initial, text, autoencoder, prompts,
        )  # fmt: skip
