"""What transformers computes for the chats of a judge: run by the interpreter of vLLM's environment, which has it all.

Usage: python reference.py CHECKPOINT REQUESTS ANSWERS. REQUESTS is a JSON list of bodies of chat completions, ANSWERS
becomes a list with the log-probabilities of the first token of each answer, over the whole vocabulary.
"""

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration


def main(checkpoint: str, requests: Path, answers: Path) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    answers.write_text(json.dumps([log_probs(body, processor, model) for body in json.loads(requests.read_text())]))


def log_probs(body: dict[str, Any], processor: Any, model: Any) -> list[float]:
    images = []
    messages = []
    for message in body["messages"]:
        parts = []
        for part in message["content"]:
            if part["type"] == "image_url":
                images.append(picture(part["image_url"]["url"]))
                parts.append({"type": "image"})
            else:
                parts.append(part)
        messages.append({"role": message["role"], "content": parts})
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=images, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -1]
    return torch.log_softmax(logits.double(), -1).tolist()


def picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
