"""A loss of your own through the Weaver SDK: it runs here, on log-probabilities; the server does the rest.

WEAVER_BASE_URL=http://127.0.0.1:8000 python examples/custom_loss.py

The loss is direct preference optimisation (arXiv 2305.18290): of two answers the first shall become likelier, measured
against the model as it was at the start.
"""

import argparse

import torch
from weaver import ServiceClient
from weaver.types import AdamParams, Datum, LoraConfig, ModelInput

BETA = 1.0


def answer_datum(tokenizer, prompt: str, answer: str) -> Datum:
    before = tokenizer.encode(prompt)
    tokens = before + tokenizer.encode(answer)
    counts = [0.0] * (len(before) - 1) + [1.0] * (len(tokens) - len(before))
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": torch.tensor(tokens[1:]), "weights": torch.tensor(counts)},
    )


def answer_logprobs(data: list[Datum], logprobs: list[torch.Tensor]) -> torch.Tensor:
    """Log-probability of each answer, (num_data,)."""
    masks = [torch.as_tensor(datum.loss_fn_inputs["weights"]) for datum in data]
    return torch.stack([(values * mask).sum() for values, mask in zip(logprobs, masks, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-model", default="weaver-rl/tiny")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    with ServiceClient() as service:
        training = service.create_model(base_model=options.base_model, lora_config=LoraConfig(rank=16, seed=0))
        tokenizer = training.tokenizer
        # Liked and disliked answers take turns.
        data = [
            answer_datum(tokenizer, f"{first} + {second} =", f" {value}")
            for first in range(4)
            for second in range(4)
            for value in (first + second, first * second + 1)
        ]
        start = training.forward(data, "forward_logprob")["result"]["loss_fn_outputs"]
        reference = answer_logprobs(data, [torch.tensor(output["logprobs"]["data"]) for output in start])

        def dpo(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            gained = answer_logprobs(data, logprobs) - reference
            margin = gained[0::2] - gained[1::2]
            loss = -torch.nn.functional.logsigmoid(BETA * margin).mean()
            return loss, {"margin": float(margin.detach().mean())}

        for step in range(options.steps):
            answer = training.forward_backward_custom(data, dpo)
            training.optim_step(AdamParams(learning_rate=5e-3))
            print(
                f"step {step:3d}  loss {float(answer['loss']):.4f}  margin {answer['metrics']['margin']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
