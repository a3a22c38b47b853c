"""What wrote the files beside it, in an environment with torch 2.13; run from the repository root."""

import torch
from safetensors.torch import save_file
from torch import nn

torch.manual_seed(0)


class Bilinear(nn.Linear):
    pass


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 4, bias=False)
        self.blocks = nn.ModuleList([Bilinear(4, 8) for _ in range(2)])
        self.head = nn.Linear(4, 3, bias=False)


m = Model()
o = "tests/data/torch/"
torch.save(m.state_dict(), o + "state-dict.pt")
torch.save(m, o + "module.pt")
base = torch.arange(12.0).reshape(3, 4)
torch.save(
    {
        "transposed": base.T,
        "part": base[1:, 2:],
        "whole": base,
        "half": base.half(),
        "bfloat16": base.bfloat16() + 0.5,
        "long": torch.arange(3),
        "parameter": nn.Parameter(base[:1].clone()),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "number": 3,
        "words": ["a", ("b", None)],
    },
    o + "values.pt",
)
torch.save(m.state_dict(), o + "before-1.6.pt", _use_new_zipfile_serialization=False)
x = torch.rand(5, 6)
with torch.no_grad():
    h = m.embed(x)
    for b in m.blocks:
        left, right = b(h).chunk(2, -1)
        h = h + left * right
    y = m.head(h)
save_file({**{k: v.contiguous() for k, v in m.state_dict().items()}, "x": x, "logits": y}, o + "expected.safetensors")

# The same weights as training runs and wrappers leave them, and a head that torch.expand made of one row.
optimizer = torch.optim.Adam(m.parameters())
sum(p.sum() for p in m.parameters()).backward()
optimizer.step()
m.load_state_dict(torch.load(o + "state-dict.pt"))
compiled = nn.DataParallel(torch.compile(m))
run = {"model_state_dict": compiled.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
torch.save(run | {"epoch": 3, "step": torch.tensor(40)}, o + "checkpoint.pt")
torch.save({"net": nn.DataParallel(m), "epoch": 3}, o + "wrapped-module.pt")
expanded = dict(m.state_dict())
expanded["head.weight"] = expanded["head.weight"][1:2].clone().expand(3, 4)
torch.save(expanded, o + "expanded.pt")
