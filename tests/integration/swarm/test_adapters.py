"""LoRA adapters chosen by name, over a real network, with PEFT's own model as the yardstick."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from swarm.client.remote_model import SwarmModelForCausalLM
from swarm.errors import BadInputError, ModelFilesError, NoRouteError, SwarmError
from tests.model_pair import GREEDY, padded_batch, prompt
from tests.raw_client import RawClient
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until
from tests.tiny_adapters import LINEARS, save_tiny_adapter
from tests.tiny_models import save_tiny_model

SPANS = [(0, 2), (2, 6)]
# Without answers that hold the padding's id: what continues them would be taken for padded.
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "suppress_tokens": [0], **GREEDY}


class Offer:
    """A model with two adapters: their folders by name, and PEFT's models of them; "" is the model itself."""

    def __init__(self, family: str, folder: Path) -> None:
        self.model_folder = folder / "model"
        self.base: PreTrainedModel = save_tiny_model(family, self.model_folder)
        self.folders = {name: folder / name for name in ("red", "blue")}
        targets = list(LINEARS[family])
        self.local: dict[str, Any] = {
            "": self.base,
            "red": save_tiny_adapter(self.base, self.folders["red"], seed=1, target_modules=targets),
            "blue": save_tiny_adapter(self.base, self.folders["blue"], seed=2, target_modules=targets[:2], r=2),
        }

    def generated(self, name: str, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Greedy ids of the local model."""
        ids_out: torch.Tensor = self.local[name].generate(input_ids=ids, **inputs, **SETTINGS)
        return ids_out


@pytest.fixture(scope="module")
def offer(tmp_path_factory: pytest.TempPathFactory) -> Offer:
    return Offer("llama", tmp_path_factory.mktemp("adapters"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def remote_model(swarm: InProcessSwarm, adapter: str = "", **options: Any) -> Any:
    return SwarmModelForCausalLM.from_blocks(swarm.source, swarm.connect(adapter=adapter or None, **options))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "bloom"])
def test_adapters_over_two_hops(family: str, tmp_path: Path) -> None:
    """The main promise: the answer is that of PEFT, whatever the family, batched or one session at a time."""
    offer = Offer(family, tmp_path)
    ids, mask = padded_batch()
    with InProcessSwarm(offer.model_folder, SPANS, adapters=offer.folders) as swarm:
        for name in ("red", "blue", ""):
            remote, local = remote_model(swarm, name, max_step_tokens=7), offer.local[name]
            with torch.no_grad():
                expected = local(prompt()).logits
                assert (remote(prompt()).logits - expected).abs().max() < 1e-4 * max(1.0, expected.abs().max().item())
            assert torch.equal(remote.generate(prompt(30), **SETTINGS), offer.generated(name, prompt(30)))
            assert torch.equal(
                remote.generate(ids, attention_mask=mask, **SETTINGS), offer.generated(name, ids, attention_mask=mask)
            )
        wait_until(lambda: all(map(is_idle, swarm.nodes)))


def test_clients_with_different_adapters_at_once(offer: Offer) -> None:
    """C20: sessions with one adapter, with another and with none share every batch, and nobody notices."""
    prompts = [prompt(20, seed=seed) for seed in range(3)]
    expected = {
        (name, index): offer.generated(name, ids) for name in ("", "red", "blue") for index, ids in enumerate(prompts)
    }
    found: dict[tuple[str, int], torch.Tensor] = {}
    with InProcessSwarm(offer.model_folder, [(0, 6)], adapters=offer.folders) as swarm:
        remotes = {name: remote_model(swarm, name) for name in ("", "red", "blue")}

        def ask(name: str, index: int) -> None:
            found[name, index] = remotes[name].generate(prompts[index], **SETTINGS)

        run_at_once([lambda name=name, index=index: ask(name, index) for name, index in expected])  # type: ignore[misc]
    for case, ids in expected.items():
        assert torch.equal(found[case], ids), case


def run_at_once(tasks: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)


def test_equal_prompts_share_no_pages_across_adapters(offer: Offer) -> None:
    """Pages are found by what was sent, and the same prompt is sent whatever the adapter: the name must tell them
    apart, or the second session would go on from the first one's keys and values."""
    ids = prompt(64)
    with InProcessSwarm(offer.model_folder, [(0, 6)], adapters=offer.folders) as swarm:
        for name in ("red", "", "blue", "red"):
            assert torch.equal(remote_model(swarm, name).generate(ids, **SETTINGS), offer.generated(name, ids)), name


def test_gradients_through_an_adapter(offer: Offer) -> None:
    """Prompts are tuned on top of an adapter: the gradient of the inputs is PEFT's."""
    ids = prompt(16)
    gradients = []
    with InProcessSwarm(offer.model_folder, SPANS, adapters=offer.folders) as swarm:
        for model in (offer.local["red"], remote_model(swarm, "red")):
            embeddings = offer.base.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=embeddings, labels=ids).loss.backward()
            gradients.append(embeddings.grad)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-4 * gradients[0].abs().max()


def test_failover_keeps_the_adapter(offer: Offer) -> None:
    """A replayed history must pass through the adapter again, on a server that holds the same one."""
    ids = prompt(20)
    with InProcessSwarm(offer.model_folder, [(0, 6)], adapters=offer.folders) as swarm:
        remote = remote_model(swarm, "red")
        with remote.session(max_length=64) as session:
            first = remote.generate(ids, session=session, **(SETTINGS | {"max_new_tokens": 4}))
            # One that holds no adapter is there too, and must not be taken.
            swarm.add_server(0, 6, adapters={})
            other = swarm.add_server(0, 6, adapters={"red": offer.folders["red"]})
            lost = swarm.nodes.pop(0)
            swarm.run(lost.leave())
            second = remote.generate(first, session=session, **(SETTINGS | {"max_new_tokens": 8}))
            assert session.route[0].peer_id == other.info.peer_id
    assert torch.equal(second, offer.generated("red", ids))


def test_a_leaving_server_hands_its_sessions_to_one_with_the_adapter(offer: Offer) -> None:
    """What it holds was computed with the adapter, and can be continued only with it; nothing is computed again."""
    ids = prompt(20)
    with InProcessSwarm(offer.model_folder, [(0, 6)], adapters=offer.folders, drain_timeout_s=20.0) as swarm:
        remote = remote_model(swarm, "red")
        with remote.session(max_length=64) as session:
            first = remote.generate(ids, session=session, **(SETTINGS | {"max_new_tokens": 4}))
            others = [
                swarm.add_server(0, 6, adapters={}),
                swarm.add_server(0, 6, adapters={"red": offer.folders["red"]}),
            ]
            with RawClient(others[1].info) as raw:
                before = raw.info()
            leaving = swarm.nodes.pop(0)
            swarm.run(leaving.drain())
            second = remote.generate(first, session=session, **(SETTINGS | {"max_new_tokens": 8}))
            assert session.route[0].peer_id == others[1].info.peer_id
        with RawClient(others[1].info) as raw:
            account = raw.info()
        assert account.num_sessions_taken_over == 1
        assert account.num_tokens_run - before.num_tokens_run == 8
    assert torch.equal(second, offer.generated("red", ids))


def test_unknown_adapter(offer: Offer) -> None:
    """A typing error is answered at once, with what there is."""
    with InProcessSwarm(offer.model_folder, SPANS, adapters=offer.folders) as swarm:
        remote = remote_model(swarm, "rde")
        with pytest.raises(BadInputError, match=r"no server offers the adapter 'rde'.*offered are blue, red"):
            remote.generate(prompt(), **SETTINGS)
        with pytest.raises(BadInputError, match="no server offers the adapter 'rde'"):
            remote(prompt())


def test_adapter_on_some_blocks_only(offer: Offer) -> None:
    """Half an adapter is another model, so the blocks without it count as served by nobody."""
    with InProcessSwarm(offer.model_folder, [(0, 2)], adapters=offer.folders) as swarm:
        swarm.add_server(2, 6, adapters={})
        with pytest.raises(NoRouteError, match=r"blocks 2-5.* with the adapter 'red'.*--adapter red=FOLDER") as caught:
            remote_model(swarm, "red", no_route_wait_s=0.1).generate(prompt(), **SETTINGS)
        assert caught.value.missing_blocks == (2, 3, 4, 5)
        assert torch.equal(remote_model(swarm).generate(prompt(), **SETTINGS), offer.generated("", prompt()))


def test_one_name_for_two_adapters(offer: Offer) -> None:
    """Names are the operators' own: a route never mixes two adapters that happen to be called the same."""
    with InProcessSwarm(offer.model_folder, [(0, 2)], adapters={"mine": offer.folders["red"]}) as swarm:
        swarm.add_server(2, 6, adapters={"mine": offer.folders["blue"]})
        with pytest.raises(NoRouteError, match="the same adapter 'mine'"):
            remote_model(swarm, "mine", no_route_wait_s=0.1).generate(prompt(), **SETTINGS)
        swarm.add_server(2, 6, adapters={"mine": offer.folders["red"]})
        assert torch.equal(remote_model(swarm, "mine").generate(prompt(), **SETTINGS), offer.generated("red", prompt()))


def test_what_a_server_announces(offer: Offer) -> None:
    """Clients choose by the announcement alone: the same hash on servers of different blocks."""
    with InProcessSwarm(offer.model_folder, SPANS, adapters=offer.folders) as swarm:
        (first, second) = (node.info.adapters for node in swarm.nodes)
        assert first == second
        assert [adapter.name for adapter in first] == ["red", "blue"]
        seen = swarm.connect().servers()
        assert {server.adapters for server in seen} == {tuple(first)}


def test_pickled_adapter_at_start(offer: Offer, tmp_path: Path) -> None:
    """C21: a server does not open a pickle, and does not start without what its operator asked for."""
    (tmp_path / "adapter_config.json").write_bytes((offer.folders["red"] / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with InProcessSwarm(offer.model_folder, []) as swarm:
        with pytest.raises(ModelFilesError, match="can run code"):
            swarm.add_server(0, 6, adapters={"bad": tmp_path})
        with pytest.raises(SwarmError, match="16 are the most"):
            swarm.add_server(0, 6, adapters={f"a{number}": offer.folders["red"] for number in range(17)})
