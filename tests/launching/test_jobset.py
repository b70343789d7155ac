"""scripts/k8s/jobset.yaml fits JobSet's schema, and tells the launcher what it has to know.

jobset_schema.json has the rules of JobSet v0.12.0 for the fields that are used, and the names of
their neighbours; the file was also validated against the whole schema when it was written.
"""

import json
import re
from pathlib import Path

import pytest
import yaml

from jax_sft.runtime import exit_codes

HERE = Path(__file__).resolve().parent
JOBSET = yaml.safe_load((HERE.parents[1] / "scripts" / "k8s" / "jobset.yaml").read_text())
SCHEMA = json.loads((HERE / "jobset_schema.json").read_text())
KINDS = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
JOB = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
POD = JOB["template"]["spec"]
TRAINER = POD["containers"][0]
ENV = {variable["name"]: variable for variable in TRAINER["env"]}


def problems(value, schema, where="jobset") -> list[str]:
    """List what of a value is against a schema (the part of OpenAPI's that CRDs use)."""
    found = []
    if schema.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, int | str) else [f"{where}: {value!r}"]
    kind = KINDS.get(schema.get("type", ""))
    if kind and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        return [f"{where}: {value!r} is no {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is none of {schema['enum']}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{where}: {value!r} does not match {schema['pattern']}")
    if isinstance(value, int) and value < schema.get("minimum", value):
        found.append(f"{where}: {value!r} is below {schema['minimum']}")
    if isinstance(value, list):
        for n, item in enumerate(value):
            found += problems(item, schema.get("items", {}), f"{where}[{n}]")
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        found += [
            f"{where}.{key} is missing" for key in schema.get("required", []) if key not in value
        ]
        for key, part in value.items():
            if key in known:
                found += problems(part, known[key], f"{where}.{key}")
            elif key not in schema.get("not_checked", []):
                found.append(f"{where}.{key} is unknown")
            else:
                found.append(f"{where}.{key} is not in the reduced schema: add its rules there")
    return found


def test_the_file_fits_jobsets_schema():
    assert JOBSET["metadata"].keys() == {"name"}
    assert problems(JOBSET | {"metadata": {}}, SCHEMA) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["failurePolicy"]["rules"][0].update(action="FailJobs"),
        lambda spec: spec["failurePolicy"]["rules"][0].update(onExitCodes=[1]),
        lambda spec: spec["failurePolicy"]["rules"][0].pop("action"),
        lambda spec: spec["failurePolicy"].update(maxRestarts="5"),
        lambda spec: spec["coordinator"].pop("replicatedJob"),
        lambda spec: spec["replicatedJobs"][0]["template"]["spec"].update(parallelism="2"),
        lambda spec: spec["replicatedJobs"][0]["template"]["spec"]["template"].update(
            containers=[]
        ),
        lambda spec: spec.update(maxRestarts=3),
    ],
)
def test_the_schema_finds_mistakes(change):
    broken = json.loads(json.dumps(JOBSET | {"metadata": {}}))
    change(broken["spec"])
    assert problems(broken, SCHEMA)


def kubernetes_says(code: int, disrupted: bool = False) -> tuple[str, str]:
    """Return the reason and message of a Job one of whose pods ended so.

    As of pod_failure_policy.go and job_controller.go of Kubernetes 1.31.
    """
    for index, rule in enumerate(JOB["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        end = f"matching FailJob rule at index {index}"
        codes = rule.get("onExitCodes")
        if codes and codes["containerName"] == TRAINER["name"] and code in codes["values"]:
            message = "Container trainer for pod default/jax-sft-workers-0-1 failed with exit code"
            return "PodFailurePolicy", f"{message} {code} {end}"
        if disrupted and {"type": "DisruptionTarget", "status": "True"} in rule.get(
            "onPodConditions", []
        ):
            return "PodFailurePolicy", f"Pod default/x has condition DisruptionTarget {end}"
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def jobset_does(reason: str, message: str) -> str:
    """Return JobSet's action: the first rule that matches, else RestartJobSet."""
    for rule in JOBSET["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("code", "action"),
    [
        (exit_codes.USER_ERROR, "FailJobSet"),
        (exit_codes.BAD_DATA, "FailJobSet"),
        (exit_codes.NOT_SAVED, "FailJobSet"),
        (exit_codes.REQUEUE, "RestartJobSetAndIgnoreMaxRestarts"),
        (exit_codes.LOST, "RestartJobSet"),
        (1, "RestartJobSet"),
        (137, "RestartJobSet"),
    ],
)
def test_every_exit_code_leads_to_what_it_means(code, action):
    assert jobset_does(*kubernetes_says(code)) == action


def test_a_disruption_does_not_count():
    assert jobset_does(*kubernetes_says(137, disrupted=True)) == "RestartJobSetAndIgnoreMaxRestarts"
    # A user's error is one, even in a pod that is being drained.
    assert jobset_does(*kubernetes_says(64, disrupted=True)) == "FailJobSet"


def test_every_pod_gets_its_coordinates():
    name = JOBSET["spec"]["replicatedJobs"][0]["name"]
    assert JOBSET["spec"]["coordinator"] == {"replicatedJob": name, "jobIndex": 0, "podIndex": 0}
    host, address = ENV["COORDINATOR_HOST"], ENV["JAX_SFT_COORDINATOR"]["value"]
    assert host["valueFrom"]["fieldRef"]["fieldPath"].endswith("['jobset.sigs.k8s.io/coordinator']")
    order = list(ENV)
    assert order.index("COORDINATOR_HOST") < order.index("JAX_SFT_COORDINATOR")  # $(...) needs it
    assert address == f"$(COORDINATOR_HOST):{TRAINER['ports'][0]['containerPort']}"
    assert ENV["JAX_SFT_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == (
        "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    )
    assert JOB["completionMode"] == "Indexed"
    assert JOB["parallelism"] == JOB["completions"] == int(ENV["JAX_SFT_NUM_PROCESSES"]["value"])


def test_a_pod_has_time_to_save_and_its_launcher_hears_the_signal():
    grace = [arg for arg in TRAINER["args"] if arg.startswith("--grace=")]
    assert POD["terminationGracePeriodSeconds"] > int(grace[0].removeprefix("--grace=")) + 10
    assert TRAINER["command"] == ["scripts/launch.sh"]
    assert "exec " in (HERE.parents[1] / "scripts" / "launch.sh").read_text().splitlines()[-1]
    assert POD["restartPolicy"] == "Never" and JOB["backoffLimit"] == 0
