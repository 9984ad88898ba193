"""The whole journey in Python: capture, compress, evaluate, deploy, pack."""

import sys
from pathlib import Path

import torch
from digits import build, test, train

import penjing as pj


def main(out: Path) -> None:
    network = pj.capture(build(), inputs=(torch.rand(2, 1, 8, 8),), name="digits")
    print(network)

    recipe = pj.Recipe(
        pj.PruneChannels(ratio=0.5),
        pj.Finetune(epochs=6, lr=0.05, teacher="original"),
        pj.Quantize(weights="int8", activations="int8"),
    )
    result = pj.compress(network, recipe, data=train(), test=test(), task="classification")
    for plan in result.plans:
        print(str(plan).splitlines()[0])

    report = pj.evaluate(result.network, test(), baseline=network, target="onnxruntime", steps=result.steps)
    print(report)

    bundle = pj.deploy(result.network, target="onnxruntime", out=out / "bundle", report=report, recipe=recipe)
    print("deploy:", *sorted(p.name for p in bundle.path.iterdir()))

    size = pj.pack(result.network, out / "digits.penjing")
    again = pj.unpack(out / "digits.penjing")
    x = torch.rand(4, 1, 8, 8)
    same = torch.equal(again(x), result.network(x))
    print(f"packed into {size:,} bytes; unpacked, it computes the same: {same}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out"))
