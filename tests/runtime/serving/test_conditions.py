"""With several conditions and a dynamic batch, each request gets the condition that it named."""

from __future__ import annotations

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

import ditf
from ditf.runtime.serving.limits import Batching
from tests.runtime.serving.pictures import noise
from tests.runtime.serving.tiny import serving


def test_requests_of_several_prompts_at_once(bank_bundle):
    pictures = [noise(seed, 48, 80) for seed in range(3)]
    with ditf.load(bank_bundle) as model:
        prompts = model.conditions
        expected = {
            (index, prompt): model.features(picture, prompt=prompt).array
            for index, picture in enumerate(pictures)
            for prompt in (*prompts, None)
        }
    assert not np.array_equal(expected[0, prompts[0]], expected[0, prompts[-1]])
    with (
        serving(bank_bundle, batching=Batching(0.05, 8)) as server,
        triton.InferenceServerClient(server.address, concurrency=16) as client,
    ):
        calls = {}
        for key in expected:
            image = triton.InferInput("image", [1, 48, 80, 3], "UINT8").set_data_from_numpy(
                pictures[key[0]][None]
            )
            parameters = {"prompt": key[1]} if key[1] else None
            calls[key] = client.async_infer("features", [image], parameters=parameters)
        for key, call in calls.items():
            found = call.get_result().as_numpy("features")[0].astype(np.float32)
            # float16 in batches of another size: a unit in the last place or so
            np.testing.assert_allclose(found, expected[key].astype(np.float32), rtol=4e-3, atol=4e-3)
        with pytest.raises(InferenceServerException, match="has no condition 'a horse'"):
            client.infer("features", [image], parameters={"prompt": "a horse"})
