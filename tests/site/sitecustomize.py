"""Let torchvision be imported beside a torch without its compiled operators. For the tests' subprocesses.

torchvision from the package index registers fake kernels for two operators that its C++ part would define; beside a
CPU build of torch that part does not load, and the import fails. Nothing here is needed by nmgraph itself.
"""

import torch


def define_torchvision_operators() -> None:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch._nmgraph_tests_library = library  # a library that is collected takes its operators with it


define_torchvision_operators()
