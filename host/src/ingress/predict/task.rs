//! `POST /v1/embeddings`, `/v1/completions`, `/v1/chat/completions`: what OpenAI's clients ask, which name the model in the body. A text that is asked for as a
//! stream comes as events.

use std::{
    pin::pin,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use modalkit_engine::Payload;

use super::{
    Answered, Call, Counted, Entered, conclude, decode_body,
    infer::elsewhere_if_large,
    run_all,
    stream::{self, EventWriter},
};
use crate::{
    config::Task,
    egress::{self, HttpResponse, LastError},
    ingress::{
        Context,
        body::{self, RequestBody},
        endpoints::Target,
        envelope::ListItem,
        exchange::{BYTES_FREE, Exchange},
        request_headers::{self, Head},
    },
    pipeline::{Generation, Model, too_many},
    protocol::{
        openai::{self, AnswerForm, AnswerHead, DONE, Request, TextChunks},
        put_comment, put_data,
    },
    work::{Detail, JobError, Location, Reply, RequestId},
};

pub(super) async fn answer(
    exchange: &Exchange,
    head: &Head<'_>,
    body: &mut RequestBody,
    id: &RequestId,
    target: Target<'_>,
    task: Task,
    counted: Counted,
) -> HttpResponse {
    let context = &*exchange.context;
    let entered = match Entered::admit(exchange, head, id, target) {
        Ok(entered) => entered,
        Err(refused) => return refused.count(context, counted, id),
    };
    let deadline = match request_headers::deadline(&head.known, &context.server, entered.begun) {
        Ok(deadline) => deadline,
        Err(error) => {
            return entered.refuse(context, id, None, egress::error(&error)).count(context, counted, id);
        }
    };
    let mut limit = pin!(exchange.timer.limit(deadline.0));
    let read = {
        let mut read = pin!(read(exchange, head, body, task));
        tokio::select! {
            biased;
            read = &mut read => read,
            () = &mut limit => Err(egress::error(&JobError::DeadlinePassed)),
        }
    };
    let (request, model) = match read {
        Ok(read) => read,
        Err(response) => return entered.refuse(context, id, None, response).count(context, counted, id),
    };
    let call = entered.call(model, deadline, false, id);
    let answered = {
        let mut work = pin!(run(exchange, &call, task, request));
        tokio::select! {
            biased;
            done = &mut work => done,
            () = &mut limit => Err(JobError::DeadlinePassed),
        }
    };
    conclude(exchange, call, target, counted, answered)
}

/// What is asked, and of which model.
///
/// # Errors
/// The answer, where neither is there.
async fn read(
    exchange: &Exchange,
    head: &Head<'_>,
    body: &mut RequestBody,
    task: Task,
) -> Result<(Request, Arc<Model>), HttpResponse> {
    let body = body::read_decoded(body, &head.headers, None, exchange).await;
    let body = body.map_err(body::BodyError::into_response)?;
    let bytes = body.len();
    let read = elsewhere_if_large(exchange, bytes, move || Request::read(&body, task)).await;
    let found = read.and_then(|read| {
        let request = read?;
        let model = find(&exchange.context, &request.model, task)?;
        Ok((request, model))
    });
    found.map_err(|error| egress::error(&error))
}

/// The model of this name, where it has the task.
fn find(context: &Context, name: &str, task: Task) -> Result<Arc<Model>, JobError> {
    let all = context.models.all();
    let known = || {
        all.values().filter(|model| model.spec().task == Some(task)).map(|model| model.name.clone()).collect()
    };
    let Some(model) = all.get(name) else {
        return Err(JobError::UnknownModel { name: Some(name.to_owned()), known: known() });
    };
    let found = model.spec().task;
    if found == Some(task) {
        return Ok(Arc::clone(model));
    }
    let known: Vec<String> = known();
    let found = found
        .map_or_else(|| "which has none".to_owned(), |found| format!("whose task is {:?}", found.name()));
    Err(JobError::Invalid(vec![Detail {
        loc: vec!["body".into(), "model".into()],
        msg: format!(
            "expected a model with task = {:?}, one of {known:?}, found {name:?}, {found}",
            task.name()
        ),
        kind: "value_error".into(),
    }]))
}

async fn run(exchange: &Exchange, call: &Call, task: Task, request: Request) -> Result<Answered, JobError> {
    let generation = call.model.serving()?;
    let queue_max = call.model.spec().batch.queue_max;
    if request.count() > queue_max {
        return Err(too_many(request.count(), queue_max));
    }
    let prefix = match task {
        Task::Embedding => "embd",
        Task::Completion => "cmpl",
        Task::Chat => "chatcmpl",
    };
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (form, member) = (request.form, request.member);
    let head = AnswerHead {
        id: format!("{prefix}-{}", call.id),
        created: since.as_secs(),
        model: request.model.clone(),
        task,
    };
    let (bytes, bytes_max) = (request.bytes(), exchange.context.server.body_bytes_max);
    if bytes <= bytes_max && bytes > BYTES_FREE {
        exchange.take_bytes(bytes)?;
    }
    let mut inputs = elsewhere_if_large(exchange, bytes, move || request.inputs(bytes_max)).await??;
    if let AnswerForm::Stream { with_usage } = form {
        let input = inputs.pop().unwrap_or_default();
        let begun = Box::pin(stream::begin(exchange, call, &generation, input)).await?;
        let writer = TextEvents(TextChunks::new(head, with_usage));
        return Ok(Answered::Stream(Box::new(begun), Box::new(writer)));
    }
    let outputs = outputs(exchange, call, &generation, member, inputs).await?;
    let bytes = outputs.iter().map(Bytes::len).sum();
    let write = move || match form {
        AnswerForm::Embeddings { in_base64 } => openai::write_embeddings(&head, &outputs, in_base64),
        AnswerForm::Texts | AnswerForm::Stream { .. } => openai::write_texts(&head, &outputs),
    };
    let answer = elsewhere_if_large(exchange, bytes, write).await?.map_err(JobError::Failed)?;
    Ok(Answered::Whole(egress::accepted(answer)))
}

/// Each input's output. One that fails fails the request: its answer has no place for an error.
async fn outputs(
    exchange: &Exchange,
    call: &Call,
    generation: &Arc<Generation>,
    member: &'static str,
    inputs: Vec<Bytes>,
) -> Result<Vec<Bytes>, JobError> {
    let inputs: Vec<Payload> = inputs.into_iter().map(Payload::Json).collect();
    let bytes = inputs.iter().filter_map(|input| input.json().map(Bytes::len)).sum();
    let several = inputs.len() > 1;
    let decode = move |generation: &Generation, inputs: &Vec<Payload>| {
        let item = |(index, (decoded, input)): (usize, (Result<_, JobError>, &Payload))| {
            let decoded = decoded.map_err(|error| in_request(error, member, several.then_some(index)))?;
            Ok(Ok((input.clone(), decoded)))
        };
        generation.decode_each(inputs).zip(inputs).enumerate().map(item).collect::<Result<Vec<ListItem>, _>>()
    };
    let items = decode_body(exchange, generation, &inputs, generation.bytes_to_decode(bytes), decode).await?;
    let output = |(index, reply): (usize, Reply)| {
        let output = reply.and_then(|output| output.into_json().map_err(JobError::Failed));
        output.map_err(|error| in_request(error, member, several.then_some(index)))
    };
    run_all(exchange, call, items).await?.into_iter().enumerate().map(output).collect()
}

/// The same error of an input, told of the request: what is wrong with a text is wrong with one of them, and what all have in common is the request's.
fn in_request(error: JobError, member: &str, index: Option<usize>) -> JobError {
    let JobError::Invalid(mut details) = error else { return error };
    for Detail { loc, .. } in &mut details {
        // Where it stands among the inputs.
        if matches!(loc.get(1), Some(Location::Index(_))) {
            loc.remove(1);
        }
        if let Some(index) = index
            && loc.get(1) == Some(&Location::Key(member.to_owned()))
        {
            loc.insert(2, Location::Index(index as u64));
        }
    }
    JobError::Invalid(details)
}

/// The events of a text.
struct TextEvents(TextChunks);

impl EventWriter for TextEvents {
    fn put_chunk(&mut self, chunk: &[u8], text: &mut Vec<u8>) {
        self.0.put_chunk(chunk, text);
    }

    fn end(&mut self, reply: Reply) -> Result<Vec<u8>, LastError> {
        let mut text = Vec::new();
        let written = reply
            .and_then(|output| output.into_json().map_err(JobError::Failed))
            .and_then(|output| self.0.put_end(&output, &mut text).map_err(JobError::Failed));
        match written {
            Ok(()) => {
                text.extend_from_slice(DONE);
                Ok(text)
            }
            Err(error) => {
                let error = egress::last_openai_event(&error);
                let mut event = Vec::new();
                put_data(&mut event, &error.event);
                Err(LastError { event: event.into(), ..error })
            }
        }
    }

    fn put_explanation(&self, explanation: &str, text: &mut Vec<u8>) {
        put_comment(text, explanation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_told_where_the_caller_wrote_it() {
        let detail = |loc: &[Location]| Detail { loc: loc.to_vec(), msg: String::new(), kind: "x".into() };
        let (body, prompt, other) = ("body".into(), "prompt".into(), "max_tokens".into());
        let place =
            |loc: &[Location], index| match in_request(JobError::Invalid(vec![detail(loc)]), "prompt", index)
            {
                JobError::Invalid(details) => details[0].loc.clone(),
                other => panic!("{other:?}"),
            };
        let (body, prompt, other): (Location, Location, Location) = (body, prompt, other);
        let one = Location::Index(1);
        let of_text = [body.clone(), one.clone(), prompt.clone()];
        assert_eq!(place(&of_text, Some(1)), [body.clone(), prompt.clone(), one.clone()]);
        assert_eq!(place(&[body.clone(), prompt.clone()], None), [body.clone(), prompt]);
        assert_eq!(place(&[body.clone(), one, other.clone()], Some(1)), [body, other]);
    }
}
