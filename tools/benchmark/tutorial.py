"""The tutorial's own way, written from scratch: the model loaded for each file, two requests for each document.

    python -m tools.benchmark.tutorial create FOLDER MODEL INDEX
    python -m tools.benchmark.tutorial search IMAGE MODEL INDEX

Its dependencies are made to work, which is more than a reader of the tutorial gets. Model and processor,
with the tokenizer that `imgbeddings()` also loads each time, have CLIP's size and random weights
(tests/clip_model.py).
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from elasticsearch import Elasticsearch
from imagesearch.clip import import_imgbeddings
from imagesearch.connection import Connection

from tests.certificates import trusting_session


def load(model: str) -> Any:
    """`imgbeddings()`: a new session, a new processor."""
    from transformers import CLIPProcessor

    theirs = import_imgbeddings()
    module = sys.modules[theirs.__module__]
    instance = object.__new__(theirs)
    instance.pca = None
    instance.session = module.create_session_for_provider(model, None, False)
    instance.processor = CLIPProcessor.from_pretrained(Path(model).parent / "processor")
    instance.processor.image_processor.do_center_crop = False
    return instance


def embedding(path: str, model: str) -> list[float]:
    vector: list[float] = load(model).to_embeddings(path)[0].tolist()
    return vector


def create(folder: str, model: str, index: str) -> None:
    connection = Connection.from_env(os.environ)
    assert connection
    es = Elasticsearch(os.environ["ES_URL"], ssl_context=connection.ssl_context())
    if not es.indices.exists(index=index):
        vector = {"type": "dense_vector", "dims": 768, "index": True, "similarity": "cosine"}
        es.indices.create(index=index, mappings={"properties": {"embeddings": vector}})
    for path in sorted(Path(folder).rglob("*.jpg")):
        document = {"embeddings": embedding(str(path), model), "desc": path.parent.name, "file_path": str(path)}
        name = hashlib.sha256(str(path).encode()).hexdigest()
        if not es.exists(index=index, id=name):
            es.create(index=index, id=name, document=document)


def search(image: str, model: str, index: str) -> None:
    knn = {"field": "embeddings", "query_vector": embedding(image, model), "k": 1, "num_candidates": 100}
    answer = trusting_session(Path(os.environ["ES_CA_CERT"])).post(
        f"{os.environ['ES_URL']}/{index}/_search",
        json={"knn": knn, "fields": ["file_path", "desc"], "_source": False},
        timeout=60,
    )
    print(json.dumps(answer.json()))


if __name__ == "__main__":
    {"create": create, "search": search}[sys.argv[1]](*sys.argv[2:])
