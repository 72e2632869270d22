"""Reinforcement learning through the Weaver SDK: sample groups, score them, turn rewards into importance weights.

WEAVER_BASE_URL=http://127.0.0.1:8000 python examples/rl_loop.py

Write your own `reward`. The one here wants answers made of digits, which even an untrained model stumbles upon.
"""

import argparse
import random
from concurrent.futures import ThreadPoolExecutor

import torch
from weaver import ServiceClient
from weaver.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams


def reward(text: str) -> float:
    """Share of characters that are digits; 0 for an empty answer."""
    return sum(character.isdigit() for character in text) / len(text) if text else 0.0


def group_data(prompt: list[int], sequences: list[dict], rewards: list[float]) -> list[Datum]:
    """One datum per completion. Its importance weight is its advantage: how much better it was than its group."""
    mean = sum(rewards) / len(rewards)
    deviation = (sum((value - mean) ** 2 for value in rewards) / len(rewards)) ** 0.5
    data = []
    for sequence, value in zip(sequences, rewards, strict=True):
        tokens = prompt + sequence["tokens"]
        masked = [0.0] * (len(prompt) - 1)
        size = len(sequence["tokens"])
        data.append(
            Datum(
                model_input=ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": torch.tensor(tokens[1:]),
                    "weights": torch.tensor(masked + [1.0] * size),
                    "importance_weights": torch.tensor(masked + [(value - mean) / (deviation + 1e-6)] * size),
                },
            )
        )
    return data


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-model", default="weaver-rl/tiny")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    options = parser.parse_args()
    chance = random.Random(0)
    with ServiceClient() as service, ThreadPoolExecutor(options.prompts) as pool:
        training = service.create_model(base_model=options.base_model, lora_config=LoraConfig(rank=16, seed=0))
        tokenizer = training.tokenizer
        for step in range(options.steps):
            sampling = training.save_weights_and_get_sampling_client(name=f"step-{step}")
            prompts = [
                tokenizer.encode(f"{chance.randrange(10)} + {chance.randrange(10)} =") for _ in range(options.prompts)
            ]

            def sample(prompt: list[int], sampling=sampling) -> list[dict]:
                params = SamplingParams(temperature=1.0, max_tokens=8)
                answer = sampling.sample(
                    prompt=ModelInput.from_ints(prompt), sampling_params=params, num_samples=options.group_size
                )
                return answer["sequences"]

            data, all_rewards = [], []
            for prompt, sequences in zip(prompts, pool.map(sample, prompts), strict=True):
                rewards = [reward(sequence["text"]) for sequence in sequences]
                data += group_data(prompt, sequences, rewards)
                all_rewards += rewards
            backward = training.forward_backward(
                data, "importance_sampling", loss_fn_config={"clip_ratio": 5.0}, wait=False
            )
            stepped = training.optim_step(AdamParams(learning_rate=5e-3), wait=False)
            backward.result()
            stepped.result()
            print(f"step {step:3d}  mean reward {sum(all_rewards) / len(all_rewards):.3f}", flush=True)


if __name__ == "__main__":
    main()
