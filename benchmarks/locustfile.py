"""Users of a running server, for the load generator Locust.

    pip install locust
    locust -f benchmarks/locustfile.py --headless -u 16 -r 4 -t 60s -H http://127.0.0.1:8000

Three in four stream a completion, one in four waits for a whole one. A stream that does not end
with [DONE], or has no text, counts as a failure.
"""

import random

from locust import HttpUser, constant, task  # pyright: ignore[reportMissingImports]

PROMPTS = ("My fellow Americans,", "The work of peace", "Tonight I can report that", "We will")


class Client(HttpUser):
    """Sends its next request when it has its answer."""

    wait_time = constant(0)

    def on_start(self):
        found = self.client.get("/v1/models", name="models").json()
        self.model = found["data"][0]["id"]

    def body(self, **more):
        prompt, new = random.choice(PROMPTS), random.randint(16, 64)
        return {"model": self.model, "prompt": prompt, "max_tokens": new, "ignore_eos": True} | more

    @task(3)
    def streamed(self):
        with self.client.post(
            "/v1/completions",
            json=self.body(stream=True),
            stream=True,
            name="streamed",
            catch_response=True,
        ) as answer:
            lines = [line for line in answer.iter_lines() if line]
            if answer.status_code != 200 or lines[-1:] != [b"data: [DONE]"] or len(lines) < 3:
                answer.failure(f"status {answer.status_code}, {len(lines)} lines")

    @task(1)
    def whole(self):
        with self.client.post(
            "/v1/completions", json=self.body(), name="whole", catch_response=True
        ) as answer:
            choice = answer.json()["choices"][0] if answer.status_code == 200 else {}
            if choice.get("finish_reason") != "length":
                answer.failure(f"status {answer.status_code}, {choice}")
