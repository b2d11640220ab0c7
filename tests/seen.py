"""Pictures drawn here, and tiny image classifiers with their image processors."""

from pathlib import Path

import torch
import transformers as tf
from PIL import Image

SIDE = 8
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
"""Classes, and what their pictures look like."""


def vit(seed: int = 0, **changes):
    """Return a random ViT of two blocks that tells three classes apart, in evaluation mode."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = dict(enumerate(COLOURS))
    config = {"image_size": SIDE, "patch_size": 4, "id2label": names, **sizes, **changes}
    return tf.ViTForImageClassification(tf.ViTConfig(**config)).eval()


def processor(side: int = SIDE):
    return tf.ViTImageProcessorPil(size={"height": side, "width": side})


def save_vit(place: Path, **changes) -> Path:
    """Write such a ViT with its image processor."""
    vit(**changes).save_pretrained(place)
    processor().save_pretrained(place)
    return place


def draw(place: Path, each: int = 4) -> Path:
    """Draw pictures of several sizes and formats, a folder for each class."""
    for name, (red, green, blue) in COLOURS.items():
        folder = place / name
        folder.mkdir(parents=True)
        for index in range(each):
            shade = Image.new("RGB", (8 + index, 8), (red - index if red else 0, green, blue))
            shade.putpixel((index, 3), (255, 255, 255))
            shade.save(folder / f"{index}.{('png', 'bmp')[index % 2]}")
    return place


def taught_vit(seed: int = 0):
    """Return a ViT that has learned the three colours."""
    model = vit(seed).train()
    images = [Image.new("RGB", (SIDE, SIDE), colour) for colour in COLOURS.values()]
    pixels = processor()(images=images, return_tensors="pt")["pixel_values"]
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, torch.arange(len(images)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()
