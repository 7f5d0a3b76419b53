"""A server that draws under the guard: python examples/guard_server.py [MODEL] [THRESHOLDS.yaml]; extra "server".

POST /draw with {"prompt": TEXT, "seed": 0}: a PNG, with the verdict in the header X-Verdict; status 451 where the guard
refuses. One picture is drawn at a time: a pipeline is no place for two.
"""

import io
import sys
from threading import Lock
from urllib.parse import quote

import torch
from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

import memorization as mem
from memorization.guard import Refused, protect


class Wish(BaseModel):
    prompt: str = Field(max_length=2000)
    seed: int = Field(0, ge=0, lt=2**63)


def server(pipe, guard=None, **options) -> FastAPI:
    """The app; ``guard`` is what ``protect`` gave for ``pipe``, ``options`` are those of the pipeline's call."""
    app, alone = FastAPI(), Lock()

    @app.post("/draw")
    def draw(wish: Wish) -> Response:
        with alone:
            try:
                generator = torch.Generator().manual_seed(wish.seed)
                (image,) = pipe(wish.prompt, generator=generator, **options).images
            except Refused as refused:
                return Response(str(refused), status_code=451, media_type="text/plain")
            said = str(guard.verdicts[0]) if guard else ""
        file = io.BytesIO()
        image.save(file, format="PNG")
        return Response(file.getvalue(), media_type="image/png", headers={"X-Verdict": quote(said, safe=" :;,()=<>%")})

    return app


def main(name: str = "testbed-eps", threshold: str = "1.0") -> None:
    import uvicorn

    model = mem.load(name)
    known = float(threshold) if threshold.replace(".", "", 1).isdigit() else threshold
    guard = protect(model.pipe, known, action=("reseed", "refuse"))
    uvicorn.run(server(model.pipe, guard, num_inference_steps=50, guidance_scale=model.spec.scale))


if __name__ == "__main__":
    main(*sys.argv[1:])
