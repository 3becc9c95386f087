"""Call handler.py as the container of an endpoint does: imported from its file, JSON in, JSON out."""

import base64
import importlib.util
import json

from report import NAMES, PICTURES, TRAINED, finish, part

spec = importlib.util.spec_from_file_location("handler", TRAINED / "handler.py")
handler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(handler)
endpoint = handler.EndpointHandler(str(TRAINED))
IMAGES = [base64.b64encode((PICTURES / f"{name}.png").read_bytes()).decode() for name in NAMES]


def ask(inputs, **parameters):
    return json.loads(json.dumps(endpoint({"inputs": inputs, "parameters": parameters}), allow_nan=False))


@part
def zero_shot():
    return ask(IMAGES, candidate_labels=NAMES, hypothesis_template="a photo of a {}")


@part
def embed():
    return ask({"images": IMAGES, "texts": NAMES}, task="embed", mode="InternVL-G")


@part
def caption():
    return ask(IMAGES, task="caption", prompt="中文描述:", num_beams=3, max_new_tokens=6)


@part
def match():
    return ask({"images": IMAGES, "texts": NAMES}, task="match")["scores"]


@part
def refusal():
    try:
        ask(IMAGES, task="captoin")
    except handler.RequestError as error:
        return [error.status, str(error)]


finish()
