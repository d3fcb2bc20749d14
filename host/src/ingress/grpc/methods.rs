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
    pub(super) kind: Kind,
}

/// How a call's messages are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// One request, which runs a pipeline.
    Infer,
    /// Any number of them.
    StreamInfer,
    /// Small ones, by tonic.
    Small,
}

macro_rules! methods {
    ($($service:ident $open_to:ident $kind:ident $path:expr;)*) => {
        [$(Method { path: $path, service: Service::$service, open_to: OpenTo::$open_to, kind: Kind::$kind },)*]
    };
}

static METHODS: [Method; 24] = methods! {
    Inference Callers Infer GRPC_INFER;
    Inference Callers StreamInfer GRPC_STREAM_INFER;
    Inference Everybody Small "/inference.GRPCInferenceService/ServerLive";
    Inference Everybody Small "/inference.GRPCInferenceService/ServerReady";
    Inference Callers Small "/inference.GRPCInferenceService/ModelReady";
    Inference Callers Small "/inference.GRPCInferenceService/ServerMetadata";
    Inference Callers Small "/inference.GRPCInferenceService/ModelMetadata";
    Inference Callers Small "/inference.GRPCInferenceService/ModelConfig";
    Inference Callers Small "/inference.GRPCInferenceService/ModelStatistics";
    Inference Callers Small "/inference.GRPCInferenceService/RepositoryIndex";
    Inference Management Small "/inference.GRPCInferenceService/RepositoryModelLoad";
    Inference Management Small "/inference.GRPCInferenceService/RepositoryModelUnload";
    Inference Management Small "/inference.GRPCInferenceService/TraceSetting";
    Inference Management Small "/inference.GRPCInferenceService/LogSettings";
    Inference Callers Small "/inference.GRPCInferenceService/SystemSharedMemoryStatus";
    Inference Callers Small "/inference.GRPCInferenceService/SystemSharedMemoryRegister";
    Inference Callers Small "/inference.GRPCInferenceService/SystemSharedMemoryUnregister";
    Inference Callers Small "/inference.GRPCInferenceService/CudaSharedMemoryStatus";
    Inference Callers Small "/inference.GRPCInferenceService/CudaSharedMemoryRegister";
    Inference Callers Small "/inference.GRPCInferenceService/CudaSharedMemoryUnregister";
    Health Everybody Small "/grpc.health.v1.Health/Check";
    Health Everybody Small "/grpc.health.v1.Health/Watch";
    Reflection Everybody Small "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    ReflectionAlpha Everybody Small "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
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
