//! What code of the Python library asks for beside its pipeline: names that it imports, the configuration, and queues of its own.

use std::fs;

use modalkit_tests::{Setup, wait_until};
use serde_json::{Value, json};

use super::ask;

/// Every name that files of the library are known to import, old and new.
const IMPORTS: &str = r#"
from modalkit import InferencePipeline, ModalConfig, ModalService, Settings, create_web_endpoints
from modalkit.auth import create_validate_api_key
from modalkit.exceptions import AuthConfigError, BackendError, DependencyError, TypeValidationError
from modalkit.fast_api import create_app
from modalkit.inference import InferencePipeline as _
from modalkit.inference_pipeline import InferencePipeline as _
from modalkit.iomodel import AsyncInputModel, AsyncOutputModel, DelayedFailureOutputModel, InferenceOutputModel, SyncInputModel
from modalkit.logger import LOGGER
from modalkit.modal_config import ModalConfig as _
from modalkit.modal_service import ModalService as _, create_web_endpoints as _
from modalkit.modalapp import ModalService as _
from modalkit.modalutils import ModalConfig as _
from modalkit.settings import AppSettings, AuthConfig, BatchConfig, BuildConfig, CloudBucketMount, DeploymentConfig
from modalkit.settings import ModelSettings, Mount, MountType, QueueConfig, Volume
from modalkit.task_queue import InMemoryBackend, QueueBackend, SQSBackend, TaskiqBackend
from modalkit.task_queue import create_backend, get_queue_backend, register_backend, send_response_queue
from modalkit.utils import get_api_key, send_response_sqs
import modal
from modal import App, Image, Mount as _, Secret, Volume as _, CloudBucketMount as _
from modal import asgi_app, batched, concurrent, enter, exit, method, parameter
from modal.experimental import stop_fetching_inputs
"#;

/// An application as the library's documentation has it, with a queue backend of its own.
const APP: &str = r#"
import asyncio

modal_config = ModalConfig()
SettingsModel = modal_config.model_settings


class Text(__import__("pydantic").BaseModel):
    text: str


class Told(InferencePipeline):
    def predict(self, input_list: list[Text], preprocessed_data=None):
        return input_list

    def postprocess(self, input_list, raw_output):
        config = ModalConfig()
        settings = config.app_settings
        return [
            {
                "text": item.text,
                "app_name": config.app_name,
                "batch": config.get_batched_method_settings(),
                "cpu": settings.deployment_config.cpu,
                "backend": settings.queue_config.backend,
                "entry": config.model_settings.model_entries,
                "common": config.model_settings.common,
                "volumes": sorted(config.all_volumes),
            }
            for item in raw_output
        ]


class Pigeons(QueueBackend):
    """Takes nothing at first, as somebody who is out."""

    def __init__(self):
        self.tries = 0

    async def send_message(self, queue_name, message):
        self.tries += 1
        await asyncio.sleep(0)
        if self.tries == 1:
            raise ConnectionError("nobody is in")
        if self.tries == 2:
            return False
        with open(f"{queue_name}.jsonl", "a") as file:
            file.write(message + "\n")
        return True


app = modal.App(modal_config.app_name)


@app.cls(**modal_config.get_app_cls_settings())
class Service(ModalService):
    inference_implementation = Told
    model_name: str = modal.parameter(default="told")
    modal_utils = modal_config


service = Service(queue_backend=Pigeons())
"#;

#[test]
fn an_application_imports_what_it_knows_reads_the_hosts_configuration_and_sends_by_its_own_queue() {
    let config = "[app_settings]\napp_prefix = \"shop\"\n[app_settings.batch_config]\nmax_batch_size = 3\nwait_ms = 7\n\
        [app_settings.queue_config.backends.pigeons]\nkind = \"model\"\nmodel = \"told\"\n\
        [app_settings.queue_config.queues]\nresults = \"pigeons\"\n\
        [model_settings.common]\nlanguage = \"en\"\n\
        [model_settings.model_entries.told]\nsize = 4\n\
        [model_settings.model_entries.told.deployment_config]\ncpu = 1.0\n\
        [model_settings.model_entries.told.python]\napp = \"service/app.py\"\n";
    let source = format!("{IMPORTS}{}", APP.replace("def predict(", "def __init__(self, *args, **kwargs):\n        super().__init__(*args, **kwargs)\n\n    def predict("));
    let host = Setup::new()
        .variable("MODALKIT_APP_POSTFIX", "-live")
        .python("told", &[("service/app.py", &source), ("pipeline.py", "")])
        .config(config)
        .ready();
    wait_until("it serves", || ask(&host, "told", &json!({"text": "a"})).0 == 200);
    let (_, answer) = ask(&host, "told", &json!({"text": "a"}));
    let volume = host.volume();
    assert_eq!(
        answer,
        json!({
            "status": "success", "text": "a", "app_name": "shop-live", "batch": {"max_batch_size": 3, "wait_ms": 7},
            "cpu": 1.0, "backend": "memory", "entry": {"told": {"size": 4}}, "common": {"language": "en"},
            "volumes": [volume],
        })
    );
    let job = host
        .job("told", &json!({"message": {"text": "by air"}, "success_queue": "results", "meta": {"n": 1}}));
    assert_eq!(host.ended(&job)["result"]["text"], "by air");
    let file = volume.join("told/results.jsonl");
    wait_until("it was delivered at the third try", || {
        fs::read_to_string(&file).is_ok_and(|text| text.ends_with('\n'))
    });
    let lines = fs::read_to_string(&file).unwrap();
    let sent: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(sent.len(), 1, "{lines}");
    assert!(sent[0].to_string().contains("by air") && sent[0].to_string().contains("success"), "{lines}");
    let _ = host.logged("why it was not sent", |line| {
        line["message"].to_string().contains("ConnectionError: nobody is in")
    });
    wait_until("it counts as delivered", || {
        host.get(&format!("/jobs/{job}")).1["delivery"]["state"] == "delivered"
    });
    // A name that leads nowhere is refused before the job is accepted.
    let (status, answer) = host.post(
        "/predict_async?model_name=told",
        &json!({"message": {"text": "x"}, "success_queue": "owls://results"}),
    );
    assert!(status == 422 && answer.to_string().contains("owls"), "{status} {answer}");
}
