"""Training steps of other libraries, for ``sae_step.py --torch PYTHON``: it runs this file in that interpreter.

The first line of output is JSON: the steps that there are, and what is missing. Then each line of input that names a
step runs it once, and the answer is one line when it is done.
"""

import argparse
import json
import sys

import torch


def dense_step(options, x):
    """A top-k SAE written out in torch, with the decoder's columns kept at unit length and counters."""
    w_dec = torch.randn(options.d_model, options.features)
    w_dec /= w_dec.norm(dim=0, keepdim=True)
    w_enc, w_dec, b_dec = (torch.nn.Parameter(w.clone()) for w in (w_dec.T, w_dec, x.mean(0)))
    optimizer = torch.optim.Adam([w_enc, w_dec, b_dec], lr=options.lr)
    quiet = torch.zeros(options.features, dtype=torch.int32)

    def step():
        pre = (x - b_dec) @ w_enc.T
        values, indices = torch.topk(pre, options.k)
        codes = torch.zeros_like(pre).scatter(1, indices, values)
        loss = ((x - codes @ w_dec.T - b_dec) ** 2).sum() / (x**2).sum()
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            w_dec.grad -= w_dec * (w_dec.grad * w_dec).sum(0, keepdim=True)
            optimizer.step()
            w_dec.div_(w_dec.norm(dim=0, keepdim=True))
            fired = torch.zeros(options.features, dtype=torch.bool)
            fired[indices[values != 0]] = True
            quiet.add_(len(x))
            quiet[fired] = 0

    return step


def saelens_steps(options, x) -> dict:
    """``training_forward_pass``, the gradients and Adam; nothing else of what its trainer does."""
    import sae_lens
    from sae_lens.saes import batchtopk_sae, jumprelu_sae, topk_sae
    from sae_lens.saes.sae import TrainStepInput

    shape = {"d_in": options.d_model, "d_sae": options.features, "dtype": "float32", "device": "cpu"}
    made = {
        "topk": topk_sae.TopKTrainingSAE(topk_sae.TopKTrainingSAEConfig(k=options.k, **shape)),
        "topk, sparse": topk_sae.TopKTrainingSAE(
            topk_sae.TopKTrainingSAEConfig(k=options.k, use_sparse_activations=True, **shape)
        ),
        "batchtopk": batchtopk_sae.BatchTopKTrainingSAE(batchtopk_sae.BatchTopKTrainingSAEConfig(k=options.k, **shape)),
        "jumprelu": jumprelu_sae.JumpReLUTrainingSAE(jumprelu_sae.JumpReLUTrainingSAEConfig(**shape)),
    }
    sae = made["jumprelu"]
    with torch.no_grad():
        pre = sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
        sae.threshold.copy_(thresholds(options, pre))

    def step_of(sae):
        optimizer = torch.optim.Adam(sae.parameters(), lr=options.lr)

        def step():
            given = TrainStepInput(x, {"l0": 1.0}, None, 1, False)
            optimizer.zero_grad()
            sae.training_forward_pass(given).loss.backward()
            optimizer.step()

        return step

    version = getattr(sae_lens, "__version__", "")
    return {f"SAELens {version} ({name})": step_of(sae) for name, sae in made.items()}


def dictionary_learning_steps(options, x) -> dict:
    """``update`` of its trainers, after their first step."""
    from dictionary_learning.trainers import batch_top_k, jumprelu, top_k

    common = {"steps": 100_000, "activation_dim": options.d_model, "dict_size": options.features, "layer": 0}
    common |= {"lm_name": "none", "lr": options.lr, "device": "cpu"}
    made = {
        "topk": top_k.TopKTrainer(k=options.k, **common),
        "batchtopk": batch_top_k.BatchTopKTrainer(k=options.k, **common),
        "jumprelu": jumprelu.JumpReluTrainer(target_l0=float(options.k), **common),
    }
    ae = made["jumprelu"].ae
    with torch.no_grad():
        ae.threshold.copy_(thresholds(options, x @ ae.W_enc + ae.b_enc))
    return {
        f"dictionary_learning ({name})": lambda trainer=trainer: trainer.update(1, x) for name, trainer in made.items()
    }


def thresholds(options, pre):
    """Of each feature, what a share k / features of the tokens exceeds."""
    return torch.topk(pre, max(1, round(len(pre) * options.k / options.features)), dim=0).values[-1].clamp(min=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--d-model", "--features", "--k", "--batch"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    options = parser.parse_args()

    answer, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    torch.manual_seed(0)
    x = torch.randn(options.batch, options.d_model)
    steps, missing = {"dense in torch (topk)": dense_step(options, x)}, []
    for name, make in (("SAELens", saelens_steps), ("dictionary_learning", dictionary_learning_steps)):
        try:
            steps |= make(options, x)
        except ImportError as error:
            missing.append(f"{name}: {error}")
    for name in list(steps):  # a first step, also to see which run here
        try:
            steps[name]()
        except (RuntimeError, NotImplementedError) as error:
            del steps[name]
            missing.append(f"{name}: {str(error).splitlines()[0][:150]}")
    print(json.dumps({"steps": list(steps), "missing": missing}), file=answer, flush=True)
    for line in sys.stdin:
        steps[line.strip()]()
        print("done", file=answer, flush=True)


if __name__ == "__main__":
    main()
