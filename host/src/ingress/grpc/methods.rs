//! Every call over gRPC that this host answers, and whom. It answers none itself.

use modalkit_proto::grpc_inference_service_server::SERVICE_NAME;

use crate::{
    ingress::endpoints::OpenTo,
    insight::metrics::{GRPC_INFER, GRPC_STREAM_INFER},
};

/// What answers a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    Inference,
    Health,
    Reflection,
    /// Reflection as clients ask for it that are older.
    ReflectionAlpha,
}

/// One call.
pub(super) struct Method {
    pub(super) path: &'static str,
    pub(super) service: Service,
    pub(super) open_to: OpenTo,
    /// It is one request, which runs a pipeline.
    pub(super) runs: bool,
}

macro_rules! methods {
    ($($service:ident $open_to:ident $path:expr, $runs:literal;)*) => {
        [$(Method { path: $path, service: Service::$service, open_to: OpenTo::$open_to, runs: $runs },)*]
    };
}

static METHODS: [Method; 24] = methods! {
    Inference Callers GRPC_INFER, true;
    Inference Callers GRPC_STREAM_INFER, false;
    Inference Everybody "/inference.GRPCInferenceService/ServerLive", false;
    Inference Everybody "/inference.GRPCInferenceService/ServerReady", false;
    Inference Callers "/inference.GRPCInferenceService/ModelReady", false;
    Inference Callers "/inference.GRPCInferenceService/ServerMetadata", false;
    Inference Callers "/inference.GRPCInferenceService/ModelMetadata", false;
    Inference Callers "/inference.GRPCInferenceService/ModelConfig", false;
    Inference Callers "/inference.GRPCInferenceService/ModelStatistics", false;
    Inference Callers "/inference.GRPCInferenceService/RepositoryIndex", false;
    Inference Management "/inference.GRPCInferenceService/RepositoryModelLoad", false;
    Inference Management "/inference.GRPCInferenceService/RepositoryModelUnload", false;
    Inference Management "/inference.GRPCInferenceService/TraceSetting", false;
    Inference Management "/inference.GRPCInferenceService/LogSettings", false;
    Inference Callers "/inference.GRPCInferenceService/SystemSharedMemoryStatus", false;
    Inference Callers "/inference.GRPCInferenceService/SystemSharedMemoryRegister", false;
    Inference Callers "/inference.GRPCInferenceService/SystemSharedMemoryUnregister", false;
    Inference Callers "/inference.GRPCInferenceService/CudaSharedMemoryStatus", false;
    Inference Callers "/inference.GRPCInferenceService/CudaSharedMemoryRegister", false;
    Inference Callers "/inference.GRPCInferenceService/CudaSharedMemoryUnregister", false;
    Health Everybody "/grpc.health.v1.Health/Check", false;
    Health Everybody "/grpc.health.v1.Health/Watch", false;
    Reflection Everybody "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", false;
    ReflectionAlpha Everybody "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", false;
};

/// The call with this path.
pub(super) fn find(path: &str) -> Option<&'static Method> {
    METHODS.iter().find(|method| method.path == path)
}

/// The services that there are, for whoever asks another.
pub(super) fn no_such_call(path: &str) -> String {
    format!(
        "no such call: {path}; there are those of {SERVICE_NAME}, grpc.health.v1.Health and grpc.reflection.v1.ServerReflection"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_of_the_file_is_there_with_its_path() {
        let file = include_str!("../../../proto/open_inference.proto");
        let names = file.lines().filter_map(|line| line.trim().strip_prefix("rpc ")?.split('(').next());
        let paths: Vec<String> = names.map(|name| format!("/{SERVICE_NAME}/{name}")).collect();
        assert!(paths.iter().all(|path| find(path).is_some()), "{paths:?}");
        let listed = METHODS.iter().filter(|method| method.service == Service::Inference).count();
        assert_eq!((paths.len(), listed), (20, 20));
        assert!(find("/inference.GRPCInferenceService/Nothing").is_none());
    }
}
