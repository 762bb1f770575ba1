"""A new Eagle from a SigLIP vision tower and a language model; only the connector starts from random weights.

The two parts are folders of safetensors or names on the Hugging Face hub, for example `google/siglip2-so400m-patch16-512` and
`Qwen/Qwen2.5-0.5B`. So that this runs anywhere in seconds, tiny ones are made on the spot; with real ones only `make_parts` goes.

    python examples/siglip_plus_language_model/main.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from eagle_model import EagleForConditionalGeneration, EagleProcessor, from_pretrained_parts
from eagle_model.tokenizer import add_eagle_tokens, train_tokenizer

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


def make_parts(folder: Path) -> None:
    """Write a tiny vision tower to `folder/siglip`, and a tiny language model with its tokenizer to `folder/language`."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    SiglipVisionModel(vision).save_pretrained(folder / "siglip")
    tokenizer = train_tokenizer(["What colour is this?", *COLOURS], vocab_size=320)
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    Qwen2ForCausalLM(text).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")


def build(folder: Path) -> tuple[EagleForConditionalGeneration, EagleProcessor]:
    """The model of the two parts, and its processor. `image_size` resizes the position embeddings to another tile size (bicubic)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "language")
    added = add_eagle_tokens(tokenizer)  # <IMG_CONTEXT>, <img>, ...: none is added to a tokenizer that has them
    model = from_pretrained_parts(folder / "siglip", folder / "language", tokenizer, image_size=64)
    print(f"{model.num_parameters():,} parameters, {added} tokens added, tiles of {model.config.tile_size} pixels")
    return model, EagleProcessor.for_config(tokenizer, model.config)


def train(model: EagleForConditionalGeneration, processor: EagleProcessor, steps: int) -> list[float]:
    """Train on images of one colour; returns the loss of every step. First the connector alone, then all parts."""
    losses = []
    for step in range(steps):
        if step in (0, steps // 3):
            parts = ("mlp1.",) if step == 0 else ("mlp1.", "language_model.", "vision_model.")
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(parts))
            optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
        conversations, images = [], []
        for name, colour in COLOURS.items():
            images.append([Image.fromarray(np.full((64, 64, 3), colour, np.uint8))])
            conversations.append([{"role": "user", "content": "<image-1>What colour is this?"}, {"role": "assistant", "content": name}])
        batch = processor(messages=conversations, images=images, return_labels=True)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Make the parts, build the model, train it, generate, save and load it."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    make_parts(folder)
    model, processor = build(folder)
    losses = train(model, processor, steps=60)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

    model.save_pretrained(folder / "eagle"), processor.save_pretrained(folder / "eagle")
    model, processor = EagleForConditionalGeneration.from_pretrained(folder / "eagle"), EagleProcessor.from_pretrained(folder / "eagle")
    for name, colour in COLOURS.items():
        image = Image.fromarray(np.full((64, 64, 3), colour, np.uint8))
        inputs = processor(text="<image-1>What colour is this?", images=[image])
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{name}: {answer}")


if __name__ == "__main__":
    main()
