"""The parts of a model that an ablation over layers compares."""

from __future__ import annotations

from torch import nn

FEW = 5  #: with fewer parts, split the largest


def layer_groups(model: nn.Module) -> dict[str, list[str]]:
    """Names of the floating-point parameters of the model's stages, by module name, and of "all".

    Stages are the model's children that have parameters. While there are fewer than five, the largest stage is replaced
    by its children: for a model that consists of body and head, these are the blocks of the body.

    Examples:
        >>> list(layer_groups(torchvision.models.resnet50()))
        ['conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4', 'fc', 'all']
    """
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.is_floating_point()}

    def inside(module: str) -> list[str]:
        return [name for name in sizes if name.startswith(f"{module}.")]

    def children(module: str) -> list[str]:
        parent = model.get_submodule(module)
        names = [f"{module}.{name}" if module else name for name, _ in parent.named_children()]
        return [name for name in names if inside(name)]

    stages = children("")
    while len(stages) < FEW:
        divisible = [stage for stage in stages if children(stage)]
        if not divisible:
            break
        largest = max(divisible, key=lambda stage: sum(sizes[name] for name in inside(stage)))
        at = stages.index(largest)
        stages[at : at + 1] = children(largest)
    return {stage: inside(stage) for stage in stages} | {"all": list(sizes)}
