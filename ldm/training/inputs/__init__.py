"""What lies between a data set and a batch of arrays: images, captions, and what the networks encode them to.

    caches           what the caches of latents and text embeddings share
    images           loads the images of rows, and replaces the rows of broken ones
    masks            loads and caches the masks of images
    latents          encodes images to the moments of their latents: cached, or at every step
    captions         decides the caption of a row in a micro-batch, and has its tokens
    text_embeddings  encodes captions: cached, at every step, or not at all where the text encoder is trained
    encode_ahead     encodes what the caches do not have yet, before it is needed
    validation       the images and captions of any data set without augmentation, for the validation loss
    micro_batches    joins all of them: `Inputs.batch(number)` returns the `Batch` of that number

Each module imports only modules above it in this list.
"""

from ldm.training.inputs.latents import sample_latents
from ldm.training.inputs.micro_batches import Batch, Inputs
from ldm.training.inputs.validation import ValidationInputs

__all__ = ["Batch", "Inputs", "ValidationInputs", "sample_latents"]
