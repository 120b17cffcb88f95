"""Other engines beside ours, for `bench.py --peers`, as far as they are installed and run.

On every device, as whole models:   torch.compile; torchao's int8 dynamic quantization
On a CPU, the blocks alone:         OpenVINO (weights in 8 or 4 bits) and onnxruntime (weights in 8 bits), both with
                                    activations in 8 bits, quantized as they come

OpenVINO needs the packages openvino and nncf, onnxruntime the packages onnxruntime, onnx and onnxscript. They are timed
only: with random weights nobody's accuracy can be compared.
"""

import contextlib
import copy
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

from runtime.layers import rebuilt


def tried(builders: dict, log) -> dict:
    """{name: builder()} of those that work; `log` is told what is left out, and why."""
    out = {}
    for name, build in builders.items():
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the tables alone are printed
                out[name] = build()
        except Exception as error:  # a peer may fail in any way
            why = (str(error).strip().splitlines() or [""])[0]
            log(f"{name} is left out: {type(error).__name__}: {why}")
    return out


def models(model, log) -> dict:
    """The 16-bit model compiled, and with its blocks quantized by torchao."""
    probe = torch.zeros(1, 32, dtype=torch.long, device=model.device)

    @torch.no_grad()
    def compiled(quantize=lambda blocks: None):
        twin = rebuilt(model, blocks=copy.deepcopy(model.blocks))
        quantize(twin.blocks)
        twin.hidden = torch.compile(twin.hidden)
        twin.hidden(probe)
        return twin

    def torchao():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        return compiled(lambda blocks: quantize_(blocks, Int8DynamicActivationInt8WeightConfig()))

    return tried({"16-bit compiled": compiled, "torchao int8": torchao}, log)


class Blocks(nn.Module):
    """The blocks of a 16-bit model as one function of x (1, L, D) and RoPE's cos, sin (L, h), in fp32."""

    def __init__(self, model):
        super().__init__()
        self.blocks = copy.deepcopy(model.blocks).float()

    def forward(self, x, cos, sin):
        state = torch.zeros(x.shape[:2], dtype=torch.bool)
        for block in self.blocks:
            x = block(x, state, (cos, sin))
        return x


@torch.no_grad()
def engines(model, log) -> dict:
    """{name: run}: run(x, cos, sin) takes numpy arrays in fp32 through the blocks of a 16-bit model on the CPU."""
    rope, _ = model.context(torch.zeros(1, 64, dtype=torch.long))
    example = torch.randn(1, 64, model.config.d_model), *(t.float() for t in rope)
    length = torch.export.Dim("L")
    shapes = {1: length}, {0: length}, {0: length}
    exported = torch.export.export(Blocks(model).eval(), example, dynamic_shapes=shapes)

    def openvino(mode: str, **options):
        import nncf
        import openvino

        mode = getattr(nncf.CompressWeightsMode, mode)
        net = nncf.compress_weights(openvino.convert_model(exported), mode=mode, **options)
        # without the second property, weights become fp32 again before they are multiplied
        properties = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128", "INFERENCE_PRECISION_HINT": "f32",
                      "INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
        request = openvino.Core().compile_model(net, "CPU", properties).create_infer_request()
        return lambda *arrays: request.infer(list(arrays))

    def onnxruntime():
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            whole, quantized = Path(folder) / "whole.onnx", Path(folder) / "quantized.onnx"
            torch.onnx.export(exported, f=whole, external_data=True, verbose=False)
            quantize_dynamic(whole, quantized, weight_type=QuantType.QInt8, use_external_data_format=True)
            session = onnxruntime.InferenceSession(quantized, options)
        names = [node.name for node in session.get_inputs()]
        return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))

    four = partial(openvino, "INT4_SYM", group_size=128, ratio=1.0, all_layers=True)
    return tried({"OpenVINO W8A8": partial(openvino, "INT8_SYM"), "OpenVINO W4A8": four,
                  "onnxruntime W8A8": onnxruntime}, log)
