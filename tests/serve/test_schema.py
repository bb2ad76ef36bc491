"""Whatever a client sends by the published schema, or against it, is no fault of the server's."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from mmjax import AsyncLLM
from serving import over

requests = pytest.importorskip("requests")
schemathesis = pytest.importorskip("schemathesis")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["served", "listening", "pooling"])
def test_no_request_is_the_servers_fault(kind: str, request: pytest.FixtureRequest) -> None:
    engine: AsyncLLM = request.getfixturevalue(kind)
    client = over(engine)
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    for operation in schema.get_all_operations():
        found = operation.ok()
        cases = found.as_strategy() | found.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

        @settings(
            max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=cases)
        def run(case: "schemathesis.Case") -> None:
            if isinstance(case.body, dict) and case.path != "/v1/embeddings":
                case.body.update({"max_tokens": 2} if "audio" not in case.path else {"max_completion_tokens": 2})
            told = requests.Request(**case.as_transport_kwargs(base_url="http://testserver")).prepare()
            response = client.request(told.method or "GET", told.url or "", content=told.body, headers=told.headers)
            assert response.status_code < 500 or response.status_code == 501, (case.as_curl_command(), response.text)

        run()
    engine.check()
