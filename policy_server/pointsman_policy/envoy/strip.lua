-- Removes the headers that explain a decision from the answer, unless the policy wants them shown.
-- Requests need nothing here: Envoy drops what clients claim before any filter runs.
local EXPLAIN_HEADERS = {
  "x-pointsman-endpoint",
  "x-pointsman-expert",
  "x-pointsman-policy",
  "x-pointsman-why",
}

function envoy_on_response(handle)
  -- For the policy server alone.
  handle:headers():remove("x-pointsman-failed-endpoint")
  local decision = handle:streamInfo():dynamicMetadata():get("pointsman")
  if decision ~= nil and decision["explain"] == true then
    return
  end
  local headers = handle:headers()
  for _, name in ipairs(EXPLAIN_HEADERS) do
    headers:remove(name)
  end
end
