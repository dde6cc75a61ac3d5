"""Loads an exported folder with transformers or timm alone and answers forward calls over a pipe.

Run as a script by `jointopt.verify`; nothing of jointopt is imported here, nor found beside this file (`python -P`). A
message is a JSON head, then a safetensors body.
"""

import importlib.util
import json
import os
import sys
from multiprocessing.connection import Connection


def receive(pipe):
    from safetensors.torch import load

    return json.loads(pipe.recv_bytes()), load(pipe.recv_bytes())


def send(pipe, head, tensors):
    from safetensors.torch import save

    body = save(tensors)  # before anything is sent, as it may raise
    pipe.send_bytes(json.dumps(head).encode())
    pipe.send_bytes(body)


def imported(name, path):
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def load_model(folder, device="cpu"):
    """The model of the folder, in eval mode: by ONNX Runtime, by its `load` function for timm, or by its auto class.

    bitsandbytes puts its layers on a GPU where there is one, unless it is told where they go.
    """
    if os.path.isfile(os.path.join(folder, "model.onnx")):
        session = imported("session", os.path.join(os.path.dirname(__file__), "onnx", "session.py"))
        return session.OnnxModel(os.path.join(folder, "model.onnx"))
    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    if "timm" in config:
        return imported("modeling_jointopt", os.path.join(folder, "modeling_jointopt.py")).load(folder)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = config["architectures"][0]
    autos = {place.rpartition(".")[2]: auto for auto, place in config.get("auto_map", {}).items()}
    kind = getattr(transformers, autos.get(kind, kind))
    if os.path.isfile(os.path.join(folder, "model.gguf")):
        import torch

        return kind.from_pretrained(folder, gguf_file="model.gguf", local_files_only=True, dtype=torch.float32).eval()
    options = {"trust_remote_code": True, "local_files_only": True, "dtype": config["dtype"]}
    if config.get("quantization_config", {}).get("quant_method") == "bitsandbytes":
        options["device_map"] = {"": device}
    return kind.from_pretrained(folder, **options).eval()


def flattened(output):
    """(keys, tensors): one key None for a plain tensor; of other outputs the entries that are tensors."""
    import torch

    if torch.is_tensor(output):
        return [None], {"0": output.cpu().contiguous()}
    entries = output.items() if hasattr(output, "items") else enumerate(output)
    found = [(key, value) for key, value in entries if torch.is_tensor(value)]
    return [key for key, _ in found], {
        str(at): value.detach().cpu().contiguous() for at, (_, value) in enumerate(found)
    }


def main():
    folder, threads, device = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    pipe = Connection(int(sys.argv[4]))
    import torch

    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # as everything was scored: torch's own default is TF32
    try:
        model = load_model(folder, device).to(device)
        loaded = sorted(name for name in ("jointopt", "search_spaces", "quant") if name in sys.modules)
        send(pipe, {"dtype": str(next(model.parameters()).dtype)[6:], "imported": loaded}, {})
    except Exception as error:
        send(pipe, {"error": f"{type(error).__name__}: {error}"}, {})
        return
    while True:
        try:
            head, tensors = receive(pipe)
        except EOFError:
            return
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        inputs = {name: tensors[name] for name in head["names"]}
        arguments = [tensors[f"argument{at}"] for at in range(head["arguments"])]
        try:
            with torch.no_grad():
                keys, outputs = flattened(model(*arguments, **inputs, **head["values"]))
            send(pipe, {"keys": keys}, {name: tensor.clone() for name, tensor in outputs.items()})
        except Exception as error:
            send(pipe, {"error": f"{type(error).__name__}: {error}"}, {})


if __name__ == "__main__":
    main()
