"""Rows a second of `prepare` on the questions and images of easy-VQA, by number of processes and by how much is checked.

python packages/eagle-train/benchmarks/prepare.py [workers ...]
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eagle_model.prompt import EAGLE_TOKENS
from eagle_train.config import parse_config
from eagle_train.data.prepare import prepare


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>", *EAGLE_TOKENS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def main() -> None:
    from easy_vqa import get_train_image_paths, get_train_questions

    tokenizer = byte_tokenizer()
    questions, answers, images = get_train_questions()
    paths = get_train_image_paths()
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder) / "rows.jsonl", "w") as file:
            for question, answer, image in zip(questions, answers, images):
                turns = [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": answer}]
                file.write(json.dumps({"image": paths[image], "conversations": turns}) + "\n")
        for verify in ("header", "ends", "decode"):
            for workers in [int(argument) for argument in sys.argv[1:]] or [1, 2]:
                data = {"sources": {"s": {"annotation": "rows.jsonl"}}, "workers": workers, "verify": verify, "facts": f"{verify}{workers}"}
                config = parse_config({"data": data}, base=Path(folder))
                start = time.perf_counter()
                report = prepare(config, tokenizer)
                seconds = time.perf_counter() - start
                again = time.perf_counter()
                prepare(config, tokenizer)
                again = time.perf_counter() - again
                print(
                    f"{verify:7s} {workers} processes: {report.rows} rows in {seconds:.1f} s, {report.rows / seconds:,.0f} rows/s; "
                    f"found again in {again:.2f} s"
                )


if __name__ == "__main__":
    main()
