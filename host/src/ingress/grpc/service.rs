//! The calls of the Open Inference Protocol: what each asks, of whom.

use std::{collections::HashMap, sync::Arc};

use futures_util::stream::Empty;
use modalkit_proto::{
    self as proto, grpc_inference_service_server::GrpcInferenceService,
    log_settings_request::setting_value::ParameterChoice as LogChange,
    log_settings_response::setting_value::ParameterChoice as LogSetting,
};
use tonic::{Request, Response, Status, Streaming};

use super::call::GrpcCall;
use crate::{
    audit::Effect,
    egress::{Refusal, job_status},
    ingress::v2::{
        self, LogSettings, Served, TraceSettings, change_log, change_traces, check_fixed, invalid_setting,
        log_settings, no_shared_memory, trace_settings,
    },
};

/// Answers one call.
pub(super) struct InferenceService(pub(super) Arc<GrpcCall>);

type Answer<T> = Result<Response<T>, Status>;

/// Calls that run pipelines are answered before tonic would read them.
fn read_elsewhere() -> Status {
    tracing::error!("a call that runs a pipeline was taken for one that doesn't");
    Status::internal("a part of the host broke its contract")
}

/// What is empty is not said.
fn said(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

#[tonic::async_trait]
impl GrpcInferenceService for InferenceService {
    type ModelStreamInferStream = Empty<Result<proto::ModelStreamInferResponse, Status>>;

    async fn server_live(&self, _: Request<proto::ServerLiveRequest>) -> Answer<proto::ServerLiveResponse> {
        Ok(Response::new(proto::ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        _: Request<proto::ServerReadyRequest>,
    ) -> Answer<proto::ServerReadyResponse> {
        Ok(Response::new(proto::ServerReadyResponse { ready: v2::is_ready(self.0.context()) }))
    }

    async fn model_ready(
        &self,
        request: Request<proto::ModelReadyRequest>,
    ) -> Answer<proto::ModelReadyResponse> {
        let proto::ModelReadyRequest { name, version } = request.into_inner();
        // One that isn't there isn't ready.
        let ready = v2::is_model_ready(self.0.context(), &name, said(&version)).unwrap_or(false);
        Ok(Response::new(proto::ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _: Request<proto::ServerMetadataRequest>,
    ) -> Answer<proto::ServerMetadataResponse> {
        Ok(Response::new(v2::server(self.0.context())))
    }

    async fn model_metadata(
        &self,
        request: Request<proto::ModelMetadataRequest>,
    ) -> Answer<proto::ModelMetadataResponse> {
        let proto::ModelMetadataRequest { name, version } = request.into_inner();
        Ok(Response::new(self.served(&name, &version)?.metadata()))
    }

    async fn model_infer(&self, _: Request<proto::ModelInferRequest>) -> Answer<proto::ModelInferResponse> {
        Err(read_elsewhere())
    }

    async fn model_stream_infer(
        &self,
        _: Request<Streaming<proto::ModelInferRequest>>,
    ) -> Answer<Self::ModelStreamInferStream> {
        Err(read_elsewhere())
    }

    async fn model_config(
        &self,
        request: Request<proto::ModelConfigRequest>,
    ) -> Answer<proto::ModelConfigResponse> {
        let proto::ModelConfigRequest { name, version } = request.into_inner();
        let config = Some(self.served(&name, &version)?.config());
        Ok(Response::new(proto::ModelConfigResponse { config }))
    }

    async fn model_statistics(
        &self,
        request: Request<proto::ModelStatisticsRequest>,
    ) -> Answer<proto::ModelStatisticsResponse> {
        let proto::ModelStatisticsRequest { name, version } = request.into_inner();
        let model_stats = v2::statistics(self.0.context(), said(&name), said(&version));
        let model_stats = model_stats.map_err(|error| job_status(&error))?;
        Ok(Response::new(proto::ModelStatisticsResponse { model_stats }))
    }

    async fn repository_index(
        &self,
        request: Request<proto::RepositoryIndexRequest>,
    ) -> Answer<proto::RepositoryIndexResponse> {
        let models = v2::index(self.0.context(), request.into_inner().ready, self.0.visibility());
        Ok(Response::new(proto::RepositoryIndexResponse { models }))
    }

    async fn repository_model_load(
        &self,
        request: Request<proto::RepositoryModelLoadRequest>,
    ) -> Answer<proto::RepositoryModelLoadResponse> {
        let proto::RepositoryModelLoadRequest { model_name, parameters, .. } = request.into_inner();
        let work = async {
            v2::load(self.0.context(), &model_name, parameters.keys().map(String::as_str)).await?;
            Ok(proto::RepositoryModelLoadResponse {})
        };
        self.0.audited(&model_name, Effect::Change, work).await
    }

    async fn repository_model_unload(
        &self,
        request: Request<proto::RepositoryModelUnloadRequest>,
    ) -> Answer<proto::RepositoryModelUnloadResponse> {
        let name = request.into_inner().model_name;
        let work = async {
            v2::unload(self.0.context(), &name).await?;
            Ok(proto::RepositoryModelUnloadResponse {})
        };
        self.0.audited(&name, Effect::Change, work).await
    }

    async fn system_shared_memory_status(
        &self,
        _: Request<proto::SystemSharedMemoryStatusRequest>,
    ) -> Answer<proto::SystemSharedMemoryStatusResponse> {
        Err(no_shared_memory().into_status())
    }

    async fn system_shared_memory_register(
        &self,
        _: Request<proto::SystemSharedMemoryRegisterRequest>,
    ) -> Answer<proto::SystemSharedMemoryRegisterResponse> {
        Err(no_shared_memory().into_status())
    }

    async fn system_shared_memory_unregister(
        &self,
        _: Request<proto::SystemSharedMemoryUnregisterRequest>,
    ) -> Answer<proto::SystemSharedMemoryUnregisterResponse> {
        Err(no_shared_memory().into_status())
    }

    async fn cuda_shared_memory_status(
        &self,
        _: Request<proto::CudaSharedMemoryStatusRequest>,
    ) -> Answer<proto::CudaSharedMemoryStatusResponse> {
        Err(no_shared_memory().into_status())
    }

    async fn cuda_shared_memory_register(
        &self,
        _: Request<proto::CudaSharedMemoryRegisterRequest>,
    ) -> Answer<proto::CudaSharedMemoryRegisterResponse> {
        Err(no_shared_memory().into_status())
    }

    async fn cuda_shared_memory_unregister(
        &self,
        _: Request<proto::CudaSharedMemoryUnregisterRequest>,
    ) -> Answer<proto::CudaSharedMemoryUnregisterResponse> {
        Err(no_shared_memory().into_status())
    }

    async fn trace_setting(
        &self,
        request: Request<proto::TraceSettingRequest>,
    ) -> Answer<proto::TraceSettingResponse> {
        let proto::TraceSettingRequest { settings, model_name } = request.into_inner();
        let (context, changes) = (self.0.context(), !settings.is_empty());
        let work = async {
            if !model_name.is_empty() {
                context.models.find(Some(&model_name))?;
            }
            if changes && !model_name.is_empty() {
                return Err(v2::no_model_settings());
            }
            if changes {
                change_traces(context, &trace_change(settings)?)?;
            }
            let shown = trace_settings(context).into_iter();
            let settings = shown.map(|(name, value)| {
                (name.to_owned(), proto::trace_setting_response::SettingValue { value })
            });
            Ok(proto::TraceSettingResponse { settings: settings.collect() })
        };
        let effect = if changes { Effect::Change } else { Effect::Read };
        self.0.audited(&model_name, effect, work).await
    }

    async fn log_settings(
        &self,
        request: Request<proto::LogSettingsRequest>,
    ) -> Answer<proto::LogSettingsResponse> {
        let settings = request.into_inner().settings;
        let changes = !settings.is_empty();
        let work = async {
            if changes {
                change_log(self.0.context(), log_change(settings)?).await?;
            }
            Ok(proto::LogSettingsResponse { settings: log_shown() })
        };
        let effect = if changes { Effect::Change } else { Effect::Read };
        self.0.audited("", effect, work).await
    }
}

impl InferenceService {
    fn served(&self, name: &str, version: &str) -> Result<Served, Status> {
        Served::find(self.0.context(), name, said(version)).map_err(|error| job_status(&error))
    }
}

fn trace_change(
    settings: HashMap<String, proto::trace_setting_request::SettingValue>,
) -> Result<TraceSettings, Refusal> {
    settings
        .into_iter()
        .try_fold(TraceSettings::default(), |change, (name, value)| change.with(&name, value.value))
}

fn log_change(
    settings: HashMap<String, proto::log_settings_request::SettingValue>,
) -> Result<LogSettings, Refusal> {
    let mut change = LogSettings::default();
    for (name, value) in settings {
        match (name.as_str(), value.parameter_choice) {
            ("log_info", Some(LogChange::BoolParam(truth))) => change.info = Some(truth),
            ("log_warning", Some(LogChange::BoolParam(truth))) => change.warning = Some(truth),
            ("log_error", Some(LogChange::BoolParam(truth))) => change.error = Some(truth),
            ("log_verbose_level", Some(LogChange::Uint32Param(level))) => {
                change.verbose_level = Some(level.into());
            }
            ("log_file", Some(LogChange::StringParam(text))) => check_fixed(&name, &text, "")?,
            ("log_format", Some(LogChange::StringParam(text))) => check_fixed(&name, &text, "default")?,
            (_, found) => {
                let expected = "expected log_info, log_warning, log_error (truth values) or log_verbose_level (a number)";
                return Err(invalid_setting(&name, format!("{expected}, found {found:?}")));
            }
        }
    }
    Ok(change)
}

fn log_shown() -> HashMap<String, proto::log_settings_response::SettingValue> {
    let LogSettings { info, warning, error, verbose_level } = log_settings();
    let truth = |truth: Option<bool>| truth.map(LogSetting::BoolParam);
    let level = verbose_level.map(|level| LogSetting::Uint32Param(u32::try_from(level).unwrap_or(u32::MAX)));
    let text = |text: &str| Some(LogSetting::StringParam(text.to_owned()));
    [
        ("log_file", text("")),
        ("log_info", truth(info)),
        ("log_warning", truth(warning)),
        ("log_error", truth(error)),
        ("log_verbose_level", level),
        ("log_format", text("default")),
    ]
    .into_iter()
    .map(|(name, parameter_choice)| {
        (name.to_owned(), proto::log_settings_response::SettingValue { parameter_choice })
    })
    .collect()
}
