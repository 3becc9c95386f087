"""tools/hub/publish.py assembles and checks a repository, which then works in a fresh interpreter."""

import pytest


@pytest.mark.feature("captions")  # the tool's own check writes captions
@pytest.mark.fresh("publish")
def test_the_tool_checks_its_output(interpreters, work):
    done = interpreters.start("publish").result()
    assert done.returncode == 0, done.stderr[-4000:]
    assert "It loads without network and gives the values of tiny." in done.stdout
    assert "Nothing was uploaded" in done.stdout
    assert (work / "published_repository" / "modeling_internvl.py").is_file()


@pytest.mark.fresh("published")
def test_it_classifies_in_a_pipeline(fresh):
    assert fresh["classified"] == ["panda", "lion", "pizza", "rocket"]


@pytest.mark.fresh("published")
def test_it_gives_the_embeddings_of_the_clone(fresh, interpreters):
    assert fresh["embeds"] == interpreters.found("save")["embeds"]


@pytest.mark.feature("captions")
@pytest.mark.fresh("published")
def test_it_gives_the_captions_of_the_clone(fresh, interpreters):
    assert fresh["captions"] == interpreters.found("save")["captions"]
