"""Supervised fine-tuning through the Weaver SDK: teach a LoRA adapter the answers of small sums.

WEAVER_BASE_URL=http://127.0.0.1:8000 python examples/sft.py
"""

import argparse
import random

import torch
from weaver import ServiceClient
from weaver.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams


def sum_datum(tokenizer, first: int, second: int) -> Datum:
    """Position i predicts token i + 1; only the answer counts."""
    prompt = tokenizer.encode(f"{first} + {second} =")
    answer = [*tokenizer.encode(f" {first + second}"), tokenizer.eos_token_id]
    tokens = prompt + answer
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": torch.tensor(tokens[1:]), "weights": torch.tensor(weights)},
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-model", default="weaver-rl/tiny")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    chance = random.Random(0)
    with ServiceClient() as service:
        training = service.create_model(base_model=options.base_model, lora_config=LoraConfig(rank=16, seed=0))
        tokenizer = training.tokenizer
        for step in range(options.steps):
            data = [sum_datum(tokenizer, chance.randrange(10), chance.randrange(10)) for _ in range(32)]
            # Both are sent at once: the server runs them in this order.
            backward = training.forward_backward(data, "cross_entropy", wait=False)
            stepped = training.optim_step(AdamParams(learning_rate=2e-3), wait=False)
            loss = backward.result()["result"]["metrics"]["loss"]
            stepped.result()
            if step % 10 == 0 or step == options.steps - 1:
                print(f"step {step:3d}  loss {loss:.4f}", flush=True)
        sampling = training.save_weights_and_get_sampling_client()
        prompt = ModelInput.from_ints(tokenizer.encode("3 + 4 ="))
        greedy = SamplingParams(temperature=0.0, max_tokens=8)
        print("3 + 4 =", repr(sampling.sample(prompt=prompt, sampling_params=greedy)["sequences"][0]["text"]))


if __name__ == "__main__":
    main()
